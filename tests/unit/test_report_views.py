"""How `longext report` writes what it found: tables of a width, notes, a page, pictures."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import report_records as made
from test_report import changed, report

from longext.errors import DataError
from longext.report.draw import report_pictures
from longext.report.layout import report_tables, shown_table
from longext.report.notes import report_notes, verdict
from longext.report.outcome import Rendered
from longext.report.page import report_page, to_markdown

EVERY = {
    "perplexity": made.perplexity(),
    "positions": made.positions(),
    "memory": made.memory_perplexity(),
    "short": made.short(),
    "effective": made.effective(),
    "passkey": made.passkey(),
    "needle": made.needle("a", "b"),
    "longeval": made.longeval(),
    "babilong": made.babilong(),
    "longbench": made.longbench(trec=63.5),
    "longbench-e": made.longbench_e(),
    "harness": made.harness(),
    "reconstruction": made.reconstruction(),
    "efficiency": made.efficiency(),
    "finetune": made.training(),
    "compress": made.training("compress-train"),
    "compare": made.compare(),
}


def pictures_of(found):
    """Figures by file name."""
    return {name: picture.figure for name, picture in report_pictures(found).items()}


def tables_of(tmp_path, **records):
    return report_tables(report(tmp_path, **records))


def test_a_row_for_each_result_the_best_marked_the_interval_in_brackets(tmp_path):
    (table,) = tables_of(tmp_path, a=made.perplexity(40.0), b=made.perplexity(60.0))
    assert table.title == "Perplexity by context length"
    assert table.columns == ["result", "512", "1,024"]
    assert table.rows == [
        ["m (a)", "40.00 (38.00-43.00)", "20.00 (18.00-23.00)"],
        ["m (b)", "60.00 (58.00-63.00)", "30.00 (28.00-33.00)"],
    ]
    assert table.best == {(0, 1), (0, 2)}
    assert table.caption == (
        "in brackets the 95% interval; less is better; the best is marked if its interval meets no other"
    )


def test_tasks_are_blocks_of_rows_and_what_is_missing_is_a_dash(tmp_path):
    table, *_ = tables_of(tmp_path, a=made.needle("x", "y"), b=made.needle("x"))
    assert table.columns[:2] == ["task", "result"]
    assert [row[:2] for row in table.rows] == [["x", "m (a)"], ["", "m (b)"], ["y", "m (a)"]]
    other = made.needle("x")
    other["by_task"] = other["by_task"][:1]
    table, *_ = tables_of(tmp_path, b=other)
    assert table.rows[1] == ["", "m (b)", "50% (25%-100%)", "-"]


def test_a_table_that_is_too_wide_is_turned(tmp_path):
    tasks = {f"a_task_with_a_name_{i}": 10.0 + i for i in range(9)}
    *_, table = tables_of(tmp_path, a=made.longbench(**tasks), b=made.longbench(**tasks))
    assert table.columns == ["", "m (a)", "m (b)"]
    assert [row[0] for row in table.rows] == list(tasks)
    assert table.rows[3][1:] == ["13.00", "13.00"]


def test_a_table_of_many_results_and_tasks_is_continued(tmp_path):
    tasks = {f"a_task_with_a_name_{i}": 10.0 + i for i in range(9)}
    records = {f"a-directory-with-a-name-{i}": made.longbench(**tasks) for i in range(9)}
    parts = [table for table in tables_of(tmp_path, **records) if table.title.startswith("LongBench by task")]
    assert len(parts) > 1
    assert parts[0].title == f"LongBench by task, part 1 of {len(parts)}"
    assert all(sum(max(map(len, texts)) + 3 for texts in zip(t.columns, *t.rows, strict=True)) <= 128 for t in parts)
    assert sum(len(table.rows) * (len(table.columns) - 1) for table in parts) == 81


def test_intervals_go_first_where_a_table_is_too_wide(tmp_path):
    wide = made.perplexity()
    row = wide["results"][0]
    wide["results"] = [{**row, "length": 512 * 2**i} for i in range(8)]
    records = {f"{i}": wide for i in range(9)}
    (table,) = tables_of(tmp_path, **records)
    assert table.rows[0][1] == "40.00"
    assert "95% intervals are in results.csv" in table.caption


def test_sets_are_named_in_titles_and_notes(tmp_path):
    found = report(tmp_path, a=made.perplexity(), b=changed(made.perplexity(), "protocol", "stride", 64))
    assert [table.title for table in report_tables(found)] == [
        f"Perplexity by context length (set {n})" for n in (1, 2)
    ]
    assert report_notes(found) == [
        "Perplexity (set 2): Not comparable with set 1, which has protocol.stride 256 (here 64)."
    ]


def test_other_data_is_told_by_its_hash_and_many_tasks_by_their_number(tmp_path):
    other = made.perplexity()
    other["data"] |= {"sha256": "e" * 64, "num_tokens": 5}
    (note,) = report_notes(report(tmp_path / "a", a=made.perplexity(), b=other))
    assert note.endswith("which has data.sha256 dddddddddddd (here eeeeeeeeeeee).")
    tasks = dict.fromkeys(("one", "two", "three", "four"), 1.0)
    rows = made.longbench(**tasks)
    rows["data"]["sha256"] = dict.fromkeys(tasks, "other")
    (note,) = report_notes(report(tmp_path / "b", a=made.longbench(**tasks), b=rows))
    assert note.endswith("which has other rows (data.sha256) of 4 tasks.")


def test_what_differs_within_a_set_is_told_and_named_under_the_table(tmp_path):
    found = report(tmp_path, a=made.passkey(trials=10), b=made.passkey(trials=40))
    assert report_tables(found)[0].caption.endswith("; see the notes: num_trials")
    assert report_notes(found) == ["Passkey: num_trials differs: 10 (m (a)), 40 (m (b))."]


def test_a_note_names_the_result_rather_than_all_its_methods(tmp_path):
    found = report(tmp_path, a=made.compare(), b=made.perplexity())
    notes = [note for note in report_notes(found) if note.startswith("Perplexity")]
    assert notes == [f"Perplexity: protocol.weighting: not recorded by {tmp_path / 'a'}."]


def test_limits_stand_with_the_results(tmp_path):
    bars = [{"name": "512", "passed": False}, {"name": "1024", "passed": True}]
    text = to_markdown(report(tmp_path, a={**made.passkey(), "bars": bars}, b=made.passkey()), {})
    assert "| result | kind | limits | command |" in text
    assert "| missed: 512 |" in text


class Page(HTMLParser):
    """Collects the texts of cells and headings, checks that tags close in order, and keeps what is linked."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.links, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "h1", "h2", "h3", "li", "p", "code"):
            self.texts.append(data)


def test_the_page_holds_every_table_and_note_and_needs_nothing_else(tmp_path):
    found = report(tmp_path, **EVERY, other=changed(made.perplexity(), "protocol", "stride", 64))
    text = report_page(Rendered(found))
    page = Page(text)
    assert page.tags.isdisjoint({"img", "link", "iframe"})
    assert page.links and all(link.startswith("#") for link in page.links)
    assert "url(http" not in text and "import" not in text.split("<script>")[1]
    for group in found.groups:
        for table in filter(None, (shown_table(group, shown, 170) for shown in group.shown)):
            for text in (
                table.title,
                *table.columns,
                *(cell for row in range(len(table.rows)) for cell in table.texts(row)),
            ):
                assert not text or text in page.texts
    assert any("protocol.stride 256 (here 64)" in text for text in page.texts)
    assert [text for text in page.texts if text == "Perplexity (set 2)"]


def test_the_page_opens_with_the_verdict_and_explains_every_point(tmp_path):
    found = report(tmp_path, a=made.perplexity(40.0), b=made.perplexity(60.0))
    text = report_page(Rendered(found))
    assert text.index(verdict(found)[0]) < text.index("<table")
    for size in ("wide", "narrow"):
        svg = text.split(f'<svg class="{size}"')[1].split("</svg>")[0]
        assert svg.count('class="tip"') == 4
        assert 'data-tip="m (a), 512: 40.00 (38.00-43.00)" data-series="0"' in svg
        assert 'aria-label="Perplexity by context length: line chart of m (a), m (b)' in svg
        assert "#222222" not in svg  # the ink follows the page's colours, in dark mode too


def test_text_of_results_is_escaped(tmp_path):
    odd = changed(made.perplexity(), "model", "id", '<b>"m"')
    found = report(tmp_path, a=odd, b=made.perplexity(50.0))
    text = report_page(Rendered(found))
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert "<b>" not in to_markdown(found, report_pictures(found))


# --- verdict ----------------------------------------------------------------------------------------------------------


def test_the_verdict_names_the_leader_at_the_longest_length_and_its_price(tmp_path):
    record = made.compare()
    for row in record["methods"][0]["perplexity"]:
        row |= {"ppl": row["ppl"] + 60, "ppl_low": row["ppl"] + 58, "ppl_high": row["ppl"] + 63}
    told = verdict(report(tmp_path, a=record))
    assert told == [
        "Perplexity: at 1,024 tokens yarn 8x ramp=paper has the lowest perplexity, 21.00 (19.00-24.00); the unchanged "
        "model has 80.50 (78.50-83.50). The price at 512 tokens, against the unchanged model: -58.4% perplexity.",
        "Loss by position: at 1-256 tokens all have 3.250.",
        "Passkey: at 512 tokens all have 50% (0%-100%).",
    ]


def test_the_verdict_calls_intervals_that_meet_a_tie(tmp_path):
    found = report(tmp_path, a=made.perplexity(40.0), b=made.perplexity(44.0), c=made.perplexity(80.0))
    (text,) = verdict(found)
    assert text.startswith(
        "Perplexity: at 1,024 tokens m (a) and m (b) share the lead (their intervals meet), the first"
    )
    (text,) = verdict(report(tmp_path / "k", a=made.passkey(0.0), b=made.passkey(1.0)))
    assert text == "Passkey: at 512 tokens no result is told apart from the best (0% to 100%): their intervals meet."


def test_the_verdict_of_one_result_is_its_first_and_last_number(tmp_path):
    assert verdict(report(tmp_path, a=made.perplexity())) == [
        "Perplexity: m has 40.00 (38.00-43.00) at 512 tokens, 20.00 (18.00-23.00) at 1,024 tokens."
    ]


# --- one result -------------------------------------------------------------------------------------------------------


def test_the_table_of_one_result_has_its_details_and_names_it_in_the_title(tmp_path):
    record = made.perplexity()
    for row in record["results"]:
        row |= {"accuracy": 0.25, "resampled": "windows"}
    (table,) = tables_of(tmp_path, a=record)
    assert table.title == "Perplexity by context length: m (ppl/sliding)"
    assert table.columns == ("length", "ppl", "95% interval", "NLL", "top-1", "tokens scored")
    assert table.rows[0] == ["512", "40.00", "38.00-43.00", "3.5000", "25.0%", "99"]
    assert table.caption == "interval: bootstrap over windows"


def test_one_passkey_has_a_table_by_length_and_one_by_depth(tmp_path):
    lengths, depths = tables_of(tmp_path, a=made.passkey())
    assert lengths.rows == [["512", "50%", "0%-100%", "512", "10"]]
    assert (depths.columns, depths.rows) == (["depth", "512"], [["50%", "50%"]])


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "perplexity": ["ppl"],
        "positions": ["ppl"],
        "memory": ["ppl", "ppl-controls"],
        "passkey": ["passkey"],
        "needle": ["needle"],
        "babilong": ["babilong"],
        "longeval": ["longeval"],
        "longbench": ["longbench"],
        "longbench-e": ["longbench"],
        "effective": ["effective"],
    }.items(),
)
def test_the_pictures_of_one_result_have_the_names_of_its_command(tmp_path, kind, names):
    assert list(pictures_of(report(tmp_path, a=EVERY[kind]))) == names


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_alone_has_a_table_and_is_drawn(tmp_path, kind):
    found = report(tmp_path, a=EVERY[kind])
    assert report_tables(found)
    for figure in pictures_of(found).values():
        figure.canvas.draw()


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_has_a_picture_whose_names_are_its_files(tmp_path, kind):
    found = report(tmp_path, a=EVERY[kind], b=EVERY[kind])
    pictures = pictures_of(found)
    assert pictures
    suites = {group.section.name for group in found.groups}
    for name, figure in pictures.items():
        assert any(name.startswith(suite) for suite in suites)
        labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        labels += [axes.get_title(loc="left") for axes in figure.axes]  # of maps
        assert len(set(labels) - {""}) >= 2, name
        figure.canvas.draw()


def lines_of(figure):
    """The lines of results, without the points that explain them and those of the legend."""
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    return [line for line in lines if str(line.get_gid()).startswith("series")]


def test_a_line_has_the_numbers_of_its_result(tmp_path):
    found = report(tmp_path, a=made.perplexity(40.0), b=made.perplexity(44.0))
    figure = pictures_of(found)["perplexity"]
    lines = lines_of(figure)
    assert [list(line.get_ydata()) for line in lines] == [[40, 20], [44, 22]]
    assert [list(line.get_xdata()) for line in lines] == [[512, 1024]] * 2


def test_lines_that_lie_on_each_other_are_both_seen(tmp_path):
    found = report(tmp_path, a=made.perplexity(40.0), b=made.perplexity(40.0), c=made.perplexity(50.0))
    figure = pictures_of(found)["perplexity"]
    styles = [line.get_linestyle() for line in lines_of(figure)]
    assert styles == ["-", "--", "-"]


def test_bars_have_the_numbers_of_their_result(tmp_path):
    found = report(tmp_path, a=made.longbench(trec=63.5, lcc=20.0), b=made.longbench(trec=50.0))
    figure = pictures_of(found)["longbench-tasks"]
    widths = [patch.get_width() for patch in figure.axes[0].patches if patch.get_width()]
    assert sorted(widths) == [20.0, 50.0, 63.5]


def test_metrics_of_different_scales_are_drawn_apart(tmp_path):
    found = report(tmp_path, a=made.harness(), b=made.harness())
    figure = pictures_of(found)["harness"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["acc", "word_perplexity"]


def test_many_results_are_rows_of_dots_with_a_panel_for_each_length(tmp_path):
    records = {f"r{i}": made.perplexity(40.0 + 9 * i) for i in range(16)}
    figure = pictures_of(report(tmp_path, **records))["perplexity"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["512 tokens", "1,024 tokens"]
    assert len(figure.axes[0].get_yticklabels()) == 16
    figure.canvas.draw()


def test_the_trained_length_is_one_dashed_line_in_every_picture(tmp_path):
    found = report(tmp_path, a=made.compare())
    for name in ("perplexity", "passkey"):
        marked = [line for line in pictures_of(found)[name].axes[0].get_lines() if list(line.get_xdata()) == [512, 512]]
        assert [line.get_linestyle() for line in marked] == ["--"]


def test_numbers_that_are_none_and_any_name_are_drawn(tmp_path):
    record = made.perplexity()
    for row in record["results"]:
        row["ppl"] = float("nan")
    assert pictures_of(report(tmp_path, a={**made.perplexity(), "model": {**made.MODEL, "id": "$x$ ^{"}}))
    with pytest.raises(DataError, match="no numbers"):
        report(tmp_path / "none", a=record)


def test_markdown_links_the_pictures_and_lists_the_results(tmp_path):
    found = report(tmp_path, a=made.passkey())
    text = to_markdown(found, report_pictures(found))
    assert text.startswith("# m: 1 result\n\n- Passkey: m has 50% (0%-100%) at 512 tokens.\n\n## Passkey\n\nA key.\n")
    assert "](passkey.png)" in text
    assert f"| {tmp_path / 'a'} | passkey | longext passkey |" in text
