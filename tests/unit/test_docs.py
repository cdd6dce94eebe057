"""What the documentation lists is what there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from longext.config import FinetuneConfig, build_config, shipped_recipes

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def table(page):
    """The rows of a page whose first cell is code: {that cell: the other cells}."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_finetune_key_is_documented_with_its_default():
    rows = table("recipes.md")
    for field in dataclasses.fields(FinetuneConfig):
        assert field.name in rows, field.name
        _, default, meaning = rows[field.name]
        assert meaning
        if field.default is dataclasses.MISSING:
            assert default == "required"
            continue
        written = build_config(FinetuneConfig, None, [f"{field.name}={default}"], {"model": "m"})
        assert getattr(written, field.name) == field.default, field.name


def test_every_shipped_recipe_is_documented_and_no_other():
    listed = {name for name in table("recipes.md") if "/" in name}
    assert listed == set(shipped_recipes())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_files_and_pages_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"-c ((?:extend|eval|compare|finetune|plan)/[\w.-]*[\w-])", text):
        assert name in shipped_recipes(), name
    for name in re.findall(r"\b((?:recipes/accelerate|tests|benchmarks)/[\w/.-]+\.(?:py|yaml))\b", text):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link


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
