"""The HTML page of `longext report`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import longext
from longext.report.build import Group, Report
from longext.report.html import page, section, table_html
from longext.report.plots import to_svg
from longext.report.report_views import (
    definition_note,
    measured_note,
    report_title,
    results_table,
    set_notes,
    set_title,
    shown_tables,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.report.tables import Table

_LEAD = (
    "Results under one protocol and on the same data stand in one table; others in sets of their own. What differs "
    "within a set is told under it. The same numbers are in result.json and results.csv beside this page."
)


def report_page(report: Report, pictures: Mapping[tuple[str, int], Mapping[str, Figure]]) -> str:
    """Return the page; `pictures` are those of each (suite, set)."""
    sections = [_set(own, report, pictures.get((own.suite.name, own.number), {})) for own in report.groups]
    return page(report_title(report), _LEAD, [*sections, _results(report)], longext.__version__)


def _set(own: Group, report: Report, pictures: Mapping[str, Figure]) -> str:
    tables = [table for shown in own.shown for table in shown_tables(own, shown)]
    drawn = [to_svg(figure, name) for name, figure in pictures.items()]
    body = "".join([*map(_titled, tables), _list(set_notes(own, report)), *drawn])
    definition = definition_note(own)
    told = f"<p>{html.escape(definition)}</p>" if definition else ""
    return section(set_title(own, report), measured_note(own), told + body)


def _titled(table: Table) -> str:
    caption = f'<p class="caption">{html.escape(table.caption)}</p>' if table.caption else ""
    return f"<h3>{html.escape(table.title)}</h3>{table_html(table)}{caption}"


def _list(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _results(report: Report) -> str:
    left_out = _list([f"Left out: {reason}" for reason in report.left_out])
    return section("What was read", "Every result with the command that made it.", _rows(report) + left_out)


def _rows(report: Report) -> str:
    """Return the table of results, its last column (commands) as code; long cells wrap."""
    table = results_table(report)
    head = "".join(f'<th class="left">{html.escape(name)}</th>' for name in table.columns)
    body = ""
    for row in table.rows:
        *cells, command = (html.escape(text) for text in row)
        body += "".join(f'<td class="left wrap">{cell}</td>' for cell in [*cells, f"<code>{command}</code>"]).join(
            ("<tr>", "</tr>")
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
