"""Numbers as people read them, tables in three forms, pictures with readable axes, strict JSON."""

from __future__ import annotations

import json
import math

import pytest

from longext.report.console import print_table
from longext.report.plots import log_ticks, new_figure
from longext.report.results import dump_json, output_directory
from longext.report.tables import Table, number, percent
from longext.staging import staged_directory

TABLE = Table("T", ["name", "x"], [["a|b", "1"], ["c", "2"]], frozenset({(1, 1)}), caption="note")


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.500"), (41.36, "41.36"), (207.54, "207.5"), (5123.4, "5,123"), (3.2e6, "3.2e+06")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text
    assert percent(0.125) == "12%"


def test_markdown_escapes_pipes_and_marks_the_best():
    text = TABLE.to_markdown()
    assert "| a\\|b | 1 |" in text
    assert "| c | **2** |" in text
    assert text.endswith("note\n")


def test_without_colour_the_best_gets_a_star():
    from rich.console import Console

    console = Console(width=60, record=True, no_color=True)
    console.print(TABLE.to_rich(mark="*"))
    assert "2*" in console.export_text()


@pytest.mark.parametrize("values", [(40, 41, 40.5), (40, 300, 200), (2.41, 2.39, 2.38), (3, 4000, 1e5)])
def test_the_perplexity_axis_always_has_ticks_and_is_never_a_magnifying_glass(values):
    axes = new_figure(4, 3).subplots()
    axes.plot([512, 1024, 2048], values)
    log_ticks(axes)
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(shown) >= 3
    assert high / low >= 2 * (1 - 1e-9)


@pytest.mark.parametrize("width", [80, 60, 40])
def test_a_table_wider_than_the_terminal_is_continued_and_no_number_is_cut(width, monkeypatch, capsys):
    numbers = [f"{n}.25 ({n}.00-{n}.50)" for n in range(10, 17)]
    rows = [["a model with a name that is long enough to fold, and more", *numbers], ["b", *numbers]]
    table = Table(
        "T", ["result", *(f"{2**n}" for n in range(9, 16))], rows, frozenset({(0, 7)}), tied=frozenset({(1, 2)})
    )
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(table)
    text = capsys.readouterr().out
    assert all(text.count(own) == 2 for own in numbers)
    assert f"{numbers[1]} ~" in text and f"{numbers[6]}*" in text and "part 2 of" in text
    assert max(map(len, text.splitlines())) <= max(width, 60)


def test_json_is_strict():
    assert json.loads(dump_json({"a": math.inf, "b": [math.nan, 1.5], "c": (1,)})) == {
        "a": None,
        "b": [None, 1.5],
        "c": [1],
    }


def test_default_output_names_model_and_time():
    assert output_directory(None, "ppl", "owner/My Model/").name.startswith("ppl-My-Model-")
    assert str(output_directory("given", "ppl", "m")) == "given"


def test_a_staged_directory_appears_complete_or_not_at_all(tmp_path):
    with staged_directory(tmp_path / "deep/out") as staging:
        (staging / "file").write_text("x")
        assert not (tmp_path / "deep/out").exists()
    assert (tmp_path / "deep/out/file").read_text() == "x"
    with pytest.raises(ZeroDivisionError), staged_directory(tmp_path / "deep/other") as staging:
        (staging / "file").write_text("x")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_text_in_a_table_is_neither_html_nor_a_formula():
    from longext.report.tables import Table, csv_text

    name = '<img src=x onerror="alert(1)">\n| a'
    text = Table(name, ["m", "ppl"], [[name, "1"]], caption=name).to_markdown()
    assert "<img" not in text and "&lt;img" in text
    assert len(text.splitlines()) == 7
    cells = ["=1+1", "+1", "-1", "@x", "\t=1", "fine", -1, -2.5]
    assert csv_text([cells]) == "'=1+1,'+1,'-1,'@x,'\t=1,fine,-1,-2.5\n"
