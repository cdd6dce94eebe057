"""One table, three writers: rich for a terminal, Markdown for a file, rows for HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longext.untrusted import spelled

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        title: one line above it.
        columns: the header; the first column is left-aligned, the others right-aligned unless in `left`.
        rows: cells as text.
        best: (row, column) pairs to emphasise.
        left: indices of further left-aligned columns.
        caption: one line below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    left: frozenset[int] = frozenset()
    caption: str = ""

    def is_left(self, column: int) -> bool:
        """True for a left-aligned column."""
        return column == 0 or column in self.left

    def to_markdown(self) -> str:
        """Return the table as GitHub Markdown, best cells bold."""
        marks = [":--" if self.is_left(i) else "--:" for i in range(len(self.columns))]
        lines = [f"**{markdown_text(self.title)}**", "", _pipe(self.columns), _pipe(marks)]
        for r, row in enumerate(self.rows):
            lines.append(_pipe([f"**{cell}**" if (r, c) in self.best else cell for c, cell in enumerate(row)]))
        caption = ["", markdown_text(self.caption)] if self.caption else []
        return spelled("\n".join([*lines, *caption, ""]))

    def to_rich(self, mark: str = "") -> RichTable:
        """Return the table for a rich console, best cells bold green; `mark` goes behind them too."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title),
            caption=Text(self.caption),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for i, column in enumerate(self.columns):
            table.add_column(Text(column), justify="left" if self.is_left(i) else "right")
        for r, row in enumerate(self.rows):
            marked = [f"{cell}{mark}" if (r, c) in self.best else cell for c, cell in enumerate(row)]
            table.add_row(
                *(Text(cell, style="bold green" if (r, c) in self.best else "") for c, cell in enumerate(marked))
            )
        return table


def _pipe(cells: Sequence[str]) -> str:
    return f"| {' | '.join(markdown_text(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def markdown_text(text: str) -> str:
    """Return text for Markdown: on one line, and no HTML in it."""
    return " ".join(text.splitlines()).replace("<", "&lt;")


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV; text that a spreadsheet would run as a formula gets an apostrophe before it."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_no_formula(cell) for cell in row] for row in rows)
    return file.getvalue()


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def number(value: float) -> str:
    """Return a perplexity-like number in at most five characters or so: 4.213, 41.4, 207, 1.2e+04."""
    if value < 10:
        return f"{value:.3f}"
    if value < 100:
        return f"{value:.2f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 100_000 else f"{value:.1e}"


def percent(value: float) -> str:
    """Return a share as a whole percentage."""
    return f"{100 * value:.0f}%"


def interval(low: float | None, high: float | None) -> str:
    """Return "low - high" for two perplexities, "-" where there is no interval."""
    return "-" if low is None or high is None else f"{number(low)} - {number(high)}"
