"""What the documentation lists is what there is."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from golden.interface import command_lines, parse

from longext.compressor.config import CompressConfig
from longext.rope.spec import ROPE_METHODS, extension_methods
from longext.settings import build_config, shipped_recipes
from longext.training.config import FinetuneConfig

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
OTHER_COMMANDS = ("CONTRIBUTING.md", "CHANGELOG.md")
OURS = "https://github.com/longext/longext/"
_OURS = re.compile(rf"{OURS}(?:blob|tree|raw)/main/|https://raw.githubusercontent.com/longext/longext/main/")
_GENERATED = "reference/"  # pages of the site that are written from the program


def table(page, section=""):
    """The rows of a page, or of one section, whose first cell is code: {that cell: the other cells}."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = text.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize(("command", "kind"), [("finetune", FinetuneConfig), ("compress-train", CompressConfig)])
def test_every_key_is_documented_with_its_default(command, kind):
    rows = table("recipes.md", f"Every key of `{command}`")
    assert set(rows) == {field.name for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(kind):
        _, default, meaning = rows[field.name]
        assert meaning
        if field.default is dataclasses.MISSING:
            assert default == "required"
            continue
        written = build_config(kind, None, [f"{field.name}={default}"], {"model": "m"})
        assert getattr(written, field.name) == field.default, field.name


def test_every_shipped_recipe_is_documented_and_no_other():
    listed = set(table("recipes.md", "Shipped recipes"))
    assert listed == set(shipped_recipes())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_files_and_pages_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"-c ((?:extend|eval|compare|compress|finetune|plan)/[\w.-]*[\w-])", text):
        assert name in shipped_recipes(), name
    for name in re.findall(r"\b((?:recipes/accelerate|tests|benchmarks)/[\w/.-]+\.(?:py|yaml))\b", text):
        assert (ROOT / name).is_file(), name


def anchors(page):
    """Return the anchors that GitHub, and the site, give the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


def prose(page):
    """Return the Markdown of a page, or of a notebook's cells, without its code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    text = prose(page)
    links = re.findall(r"\]\(\s*([^)\s]+)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        own = _OURS.match(path)
        if re.match(r"\w+:", path) and not own:
            continue
        target = ROOT / path[own.end() :] if own else (page.parent / path if path else page).resolve()
        if target.is_relative_to(ROOT / "docs" / _GENERATED):
            continue  # the strict build of the site looks at these
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("CONTRIBUTING.md", "CHANGELOG.md")], ids=lambda page: page.name
)
def test_every_command_line_of_a_page_parses(page):
    """CONTRIBUTING.md has commands that do not exist until its files are added, the changelog those of old versions."""
    for line in command_lines(page.read_text(encoding="utf-8")):
        assert parse(line).command, line


def test_every_command_is_listed_with_an_example():
    from longext.cli.app import COMMANDS
    from longext.evals.base import EVALS

    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name in [*COMMANDS, *(f"eval {name}" for name in EVALS if name != "passkey")]:
        assert f"| `{name}`" in text, name


def test_the_tree_of_the_design_is_that_of_the_package():
    script = [sys.executable, str(ROOT / "benchmarks" / "structure.py"), "--tree"]
    tree = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert f"```\n{tree}```" in (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), (
        "structure.py --tree prints it"
    )


def test_the_examples_of_the_python_api_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "out" / "result.json").is_file()
    assert len(names["frame"])


def test_every_choice_of_compression_is_documented():
    from longext.compressor.architectures import COMPRESSORS
    from longext.compressor.kv_policies import KV_POLICIES
    from longext.compressor.policies import OBJECTIVES, POLICIES
    from longext.compressor.reading.readers import MEMORIES
    from longext.evals.memory.controls import METHODS
    from longext.evals.memory.reconstruction import CONTENTS

    listed = {name.partition(":")[0] for name in table("compressor.md") if not name.startswith("--")}
    assert listed == {*COMPRESSORS, *POLICIES, *OBJECTIVES}
    listed = set(table("evaluation.md"))
    assert {*CONTENTS, *METHODS, *(MEMORIES[name].form for name in MEMORIES)} <= listed
    assert {*KV_POLICIES} - {"streaming"} <= listed


def test_every_method_is_documented_with_its_paper_its_type_and_its_parameters():
    listed, options = table("methods.md", "The methods"), table("methods.md", "The options")
    sentences = table("tutorials/choose.md", "The methods in a sentence")
    assert set(listed) - {"--method"} == set(extension_methods())
    named = {flag: row[0] for cell, row in options.items() for flag in re.findall(r"--([a-z-]+)", cell)}
    for name in extension_methods():
        method, (_, paper, written) = ROPE_METHODS[name], listed[name]
        assert " ".join(method.reference.split()[:2]).rstrip(",;") in paper, name
        assert f"`{method.rope_type}`" in written, name
        assert name in sentences, name
        for parameter in method.parameters:
            assert name in named[parameter.key.replace("_", "-")], (name, parameter.name)


def test_the_example_recipe_loads(tmp_path):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1)
    file = tmp_path / "example.yaml"
    file.write_text(example)
    assert build_config(FinetuneConfig, file, [], {}).target_length == yaml.safe_load(example)["target_length"]


def test_the_attention_example_runs():
    from longext.checkpoint.bundled import BUNDLED_MODELS

    text = (ROOT / "docs" / "longlora.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    names: dict = {}
    exec(example.replace("out/llama2-32k", str(BUNDLED_MODELS["books-5m"])), names)
    assert names["model"].model.embed_tokens.weight.grad is not None
    assert names["logits"].shape == (2, 1024, 8192)
