"""An evaluation is one file: a toy one has its command, help, recipe, limits, table, report section and completion."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
from contributing import added_file

from longext.evals.base import EVALS, make_eval
from longext.evals.runner import run_eval
from longext.report.find import section_of, sections

TOY = added_file("longext/evals/suites/toy.py")


@pytest.fixture
def toy(tmp_path_factory, monkeypatch):
    """A toy evaluation, in a file as those in evals/suites/ are; the folder it is in."""
    folder = tmp_path_factory.mktemp("suites")
    (folder / "toy.py").write_text(TOY)
    package = importlib.import_module("longext.evals.suites")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield folder
    if sys.modules.pop("longext.evals.suites.toy", None):
        EVALS.unregister("toy")


def test_it_is_listed_and_explains_itself(toy, run):
    assert "Predict a sentence that is repeated" in run("eval", "--help").output
    text = " ".join(run("eval", "toy", "--help").output.split())
    assert "Example: longext eval toy MODEL --lengths 16,32" in text
    assert "Tokens of the text, comma-separated. [default: 16,32]" in text
    assert "--fail-under" in text and "a share of 0 to 1" in text
    assert "`lengths` must be <= 256, got 1000" in run("eval", "toy", "m", "--lengths", "16,1000").stderr
    assert "Did you mean 'toy'" in run("eval", "toys").stderr


def test_it_runs_prints_and_is_run_again_from_its_recipe(toy, run, tmp_path):
    result = run("eval", "toy", "books-5m", "--lengths", "16,64", "-o", "first")
    assert result.exit_code == 0, result.stderr
    for text in ("Predicted", "A toy.", "Results: first"):
        assert text in result.output
    assert json.loads((tmp_path / "first/run.json").read_text())["config"]["lengths"] == [16, 64]
    assert (tmp_path / "first/recipe.yaml").read_text().startswith("# longext eval toy -c")
    first = json.loads((tmp_path / "first/result.json").read_text())
    again = json.loads(run("eval", "toy", "-c", "first/recipe.yaml", "-o", "second", "--json").stdout)
    assert (again["kind"], again["results"]) == ("toy", first["results"])
    assert "not of `longext eval ppl`" in run("eval", "ppl", "-c", "first/recipe.yaml").stderr
    unknown = run("eval", "toy", "books-5m", "--set", "length=16")
    assert unknown.exit_code == 2 and "unknown key 'length'. Did you mean 'lengths'?" in unknown.stderr


def test_a_missed_limit_ends_with_exit_code_1_and_the_result_is_kept(toy, run, tmp_path):
    result = run("eval", "toy", "books-5m", "--fail-under", "16=1", "--fail-under", "0", "-o", "out")
    assert result.exit_code == 1 and "Missed --fail-under: 16 is" in result.stderr
    assert [row["passed"] for row in json.loads((tmp_path / "out/result.json").read_text())["bars"]] == [False, True]
    assert "64 is not measured. Measured: 16, 32." in run("eval", "toy", "books-5m", "--fail-under", "64=1").stderr


def test_it_runs_from_python_on_an_open_model(toy, books):
    measured = run_eval(make_eval("toy", "books-5m", lengths=(32,)), books)
    assert [row["length"] for row in measured.record["results"]] == [32]
    assert section_of(measured.record).title == "Toy"


def test_the_shell_completes_it(toy):
    words = {"_LONGEXT_COMPLETE": "complete_bash", "COMP_WORDS": "longext eval t", "COMP_CWORD": "2"}
    add = f"import longext.evals.suites; longext.evals.suites.__path__.append({str(toy)!r})"
    code = f"{add}; from longext.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == ["toy"]


def test_it_is_gone_afterwards():
    assert "toy" not in EVALS
    assert "toy" not in [section.name for section in sections()]
