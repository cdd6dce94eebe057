"""What works without optional packages, and what is said where one is missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import longext
from longext import extras
from longext.errors import MissingExtraError

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PACKAGE = Path(longext.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "llama-cpp-python": "llama_cpp"}
OPTIONAL = {module for table in (extras.NEEDED, extras.FURTHER) for modules in table.values() for module in modules}

# run with the name of a folder: the commands of the core, with every optional package hidden
CORE = """
import sys
from typer.testing import CliRunner

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import longext
from longext.cli import app
folder = sys.argv[1]

def run(*args, code=0):
    result = CliRunner().invoke(app, args)
    assert result.exit_code == code, (args, result.output, result.exception)
    return result.output

said = run("extend", "books-5m", "--method", "yarn", "--factor", "8", "-o", f"{folder}/out")
assert "it is not installed: pip install 'longext[eval]'" in " ".join(said.split()), said
said = run("verify", f"{folder}/out")
assert "skip" in said and "fail" not in said, said
said = run("inspect", "books-5m", "--method", "yarn", "--factor", "8", "-o", f"{folder}/inspected")
assert "not made: pictures (this needs matplotlib: pip install 'longext[report]')" in " ".join(said.split()), said
run("plan", "books-5m", "--length", "4096")
run("recipes", "list")
run("push", f"{folder}/out", "me/model", "--dry-run")
assert "works" in run("doctor")
longext.extend("books-5m", "linear", factor=2, output=f"{folder}/second")
said = run("eval", "ppl", "books-5m", code=2)
assert said == "longext: `longext eval ppl` needs torch and transformers: pip install 'longext[eval]'\\n", said
said = run("finetune", "books-5m", "--data", "sample", "-o", f"{folder}/lora", code=2)
assert said.endswith("needs torch, transformers, peft and accelerate: pip install 'longext[train]'\\n"), said
said = run("plan", "books-5m", "--length", "512", "--probe", code=2)
assert said == "longext: `longext plan` needs torch: pip install 'longext[train]'\\n", said
try:
    longext.load("books-5m")
except longext.errors.MissingExtraError as error:
    assert str(error) == "longext.load needs torch: pip install 'longext[eval]'", error
else:
    raise AssertionError("loaded")
"""


def test_the_core_works_without_any_optional_package(tmp_path):
    code = f"HIDDEN = {sorted(OPTIONAL)}\n{CORE}"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "was not compared with what transformers builds" in card


def named(requirements):
    """The packages that requirements name, as they are imported; extras of longext itself left out."""
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names} - {"longext"}


def test_every_package_that_is_imported_is_of_the_core_or_of_an_extra():
    core = named(PROJECT["dependencies"])
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").partition(".")[0])
    third = imported - set(sys.stdlib_module_names) - {"longext"}
    # the errors of four say how to install them; huggingface-hub brings tqdm
    by_hand = {"nltk", "wonderwords", "rouge_score", "pandas", "tqdm"}
    assert third - core - OPTIONAL - by_hand == set()
    assert core <= third


def test_the_table_of_extras_is_that_of_the_project():
    listed = PROJECT["optional-dependencies"]
    for extra, modules in extras.NEEDED.items():
        own = named(listed[extra])
        through = named(listed["train"]) if "longext[train]" in listed[extra] else set()
        assert set(modules) <= own | through, extra
        brought = {*modules, *extras.FURTHER.get(extra, ())}
        assert own <= brought, extra
    for name in ("train", "eval", "report"):
        assert name in listed["all"][0]


def test_every_command_says_which_extras_it_needs():
    from longext.cli.app import COMMANDS

    without = {name for name in COMMANDS if not COMMANDS[name].extras}
    core = set("extend inspect verify plan recipes doctor push diff export serve-config".split())
    assert without <= core, "Command(..., extras=...) lets a missing package end it at once, with the install line"
    for name in COMMANDS:
        assert set(COMMANDS[name].extras) <= set(extras.NEEDED)


def test_all_that_is_missing_is_named_once_with_the_shortest_line():
    with pytest.raises(MissingExtraError, match=r"^this needs nosuch-a and nosuch-b: pip install 'longext\[eval\]'$"):
        extras.require("this", ["eval"], ["nosuch_a", "torch", "nosuch_b", "nosuch_a"])
    extras.require("this", ["eval"])
    assert MissingExtraError.exit_code == 2


def test_one_extra_is_named_where_it_brings_what_two_need(monkeypatch):
    monkeypatch.setattr(extras, "_is_there", lambda module: module not in ("jinja2", "matplotlib"))
    with pytest.raises(MissingExtraError, match=r"needs matplotlib and jinja2: pip install 'longext\[report\]'$"):
        extras.require("this", ["eval", "report"])


def test_an_import_that_fails_inside_a_package_that_is_there_is_not_explained():
    error = ModuleNotFoundError("No module named 'torch.nosuch'", name="torch.nosuch")
    assert extras.explain_import(error, "this") is None
    assert extras.explain_import(ModuleNotFoundError("No module named 'x'", name="x"), "this") is None
    assert extras.explain_import(ImportError("cannot import name y"), "this") is None


def test_flash_attn_is_built_against_the_torch_that_is_there():
    assert extras.install_line(["flash"]) == "pip install --no-build-isolation 'longext[flash]'"
