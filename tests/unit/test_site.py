"""The documentation as a site: it builds without a warning; its reference holds every flag and every public name."""

from __future__ import annotations

import dataclasses
import importlib.util
import pydoc
import re
import sys
from pathlib import Path

import pytest
from advice import commands
from typer.testing import CliRunner

import longext
from longext.cli import app

ROOT = Path(__file__).parents[2]
_FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z-]*\b")


@pytest.fixture(scope="module")
def reference():
    """Return docs/theme/reference.py, which writes the pages."""
    spec = importlib.util.spec_from_file_location("site_reference", ROOT / "docs" / "theme" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(reference):
    return reference.pages()


def flags_of_help(name):
    """Return the flags that stand at the beginning of a line of `longext NAME --help`."""
    shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, name
    lines = [re.split(r"\s{2,}", line.strip())[0] for line in shown.output.splitlines() if re.match(r"\s+-", line)]
    return {flag for line in lines for flag in _FLAG.findall(line)}


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_flag_of_the_help_is_in_the_reference(name, reference, pages):
    flags, page = flags_of_help(name), pages[reference.path_of(name)]
    assert "--help" in flags
    assert flags - set(_FLAG.findall(page)) == set()
    for flag in flags:
        assert re.search(rf"^\| [^|]*`[^`]*{flag}\b[^`]*`", page, re.MULTILINE), flag


def test_every_command_is_listed_and_every_key_has_its_row(reference, pages):
    for name in commands():
        assert f"({name.replace(' ', '-')}.md)" in pages["reference/commands/index.md"], name
    for field in dataclasses.fields(longext.CompressConfig):
        row = rf"^\| (?:`{field.name}`|[^|]*`--(?:no-)?{field.name.replace('_', '-')}\b.*`|`{field.name} <)"
        assert re.search(row, pages["reference/commands/compress-train.md"], re.MULTILINE), field.name


def test_every_public_name_is_in_the_reference(pages):
    python = "\n".join(text for path, text in pages.items() if path.startswith("reference/python/"))
    for name in set(longext.__all__) - {"__version__"}:
        assert re.search(rf"^(?:## {name}|::: longext\.[\w.]+\.{name})$", python, re.MULTILINE), name


def test_what_the_reference_takes_docstrings_from_exists(pages):
    for path in re.findall(r"^::: (.*)$", "\n".join(pages.values()), re.MULTILINE):
        assert pydoc.locate(path).__doc__, path


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch, caplog):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("mkdocs_jupyter")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    page = (tmp_path / "reference" / "commands" / "finetune" / "index.html").read_text(encoding="utf-8")
    assert "--target-length" in page
    assert "evaluate" in (tmp_path / "reference" / "python" / "functions" / "index.html").read_text(encoding="utf-8")
