"""The notebooks of the documentation run from top to bottom, as IPython would run them, and show what they end with."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def run_cell(source, names):
    """Run the source of a cell; return the value of its last expression."""
    *statements, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        statements, last = [*statements, last], None
    exec(compile(ast.Module(statements, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as ipykernel sets it
    names = {"__name__": "__main__"}
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    backend = matplotlib.get_backend()
    shown = [run_cell(source, names) for source in sources]
    plt.close("all")
    assert matplotlib.get_backend() == backend, "the pictures of a user's own notebook would no longer appear"
    for value in shown:
        assert repr(value), "rich shows it itself"
        assert "\x1b" not in repr(value)
        if isinstance(value, Figure):
            assert value._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_keeps_small_outputs_of_a_run_without_errors(file):
    assert file.stat().st_size < 300_000
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
