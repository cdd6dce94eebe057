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

_GAP = 3  # between columns
_NUMBERS = {"justify": "right", "no_wrap": True, "overflow": "fold"}


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        title: one line above it.
        columns: the header; the first column is left-aligned, the others right-aligned unless in `left`.
        rows: cells as text.
        best: (row, column) pairs to emphasise.
        tied: (row, column) pairs that share the lead: "~" stands behind them.
        left: indices of further left-aligned columns.
        caption: one line below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    left: frozenset[int] = frozenset()
    caption: str = ""
    tied: frozenset[tuple[int, int]] = frozenset()

    def texts(self, row: int) -> list[str]:
        """Return the cells of a row, those that share the lead marked."""
        return [f"{cell} ~" if (row, c) in self.tied else cell for c, cell in enumerate(self.rows[row])]

    @property
    def widths(self) -> list[int]:
        """Return the characters of each column on a terminal, the space around it included."""
        rows = [self.texts(row) for row in range(len(self.rows))]
        return [max(map(len, texts)) + _GAP for texts in zip(self.columns, *rows, strict=True)]

    @property
    def width(self) -> int:
        """Return the characters of a line on a terminal."""
        return sum(self.widths) + 1

    def parts(self, width: int) -> list[Table]:
        """Return the table, cut by columns into several with the same first ones if it is wider than `width`."""
        numbers = [c for c in range(len(self.columns)) if not self.is_left(c)]
        if self.width <= width or not numbers:
            return [self]
        names = range(1, numbers[0] + 1)  # as few of the first columns as tell rows apart stand in every part
        fixed = next((n for n in names if len({tuple(row[:n]) for row in self.rows}) == len(self.rows)), numbers[0])
        held = column_parts(self.widths, fixed, width - 1)
        return [self] if len(held) < 2 else [self._with_columns(own, i, len(held)) for i, own in enumerate(held, 1)]

    def _with_columns(self, kept: Sequence[int], number: int, count: int) -> Table:
        def moved(places: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
            return frozenset((r, kept.index(c)) for r, c in places if c in kept)

        return Table(
            f"{self.title}, part {number} of {count}",
            [self.columns[c] for c in kept],
            [[row[c] for c in kept] for row in self.rows],
            moved(self.best),
            frozenset(kept.index(c) for c in self.left if c in kept),
            self.caption if number == count else "",
            moved(self.tied),
        )

    def is_left(self, column: int) -> bool:
        """True for a left-aligned column."""
        return column == 0 or column in self.left

    def to_markdown(self) -> str:
        """Return the table as GitHub Markdown, best cells bold."""
        marks = [":--" if self.is_left(i) else "--:" for i in range(len(self.columns))]
        lines = [f"**{markdown_text(self.title)}**", "", _pipe(self.columns), _pipe(marks)]
        for r in range(len(self.rows)):
            cells = enumerate(self.texts(r))
            lines.append(_pipe([f"**{cell}**" if (r, c) in self.best else cell for c, cell in cells]))
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
            # numbers are never cut: what has to give way is text
            justify: Any = {"justify": "left", "overflow": "fold"} if self.is_left(i) else _NUMBERS
            table.add_column(Text(column), **justify)
        for r in range(len(self.rows)):
            marked = [f"{cell}{mark}" if (r, c) in self.best else cell for c, cell in enumerate(self.texts(r))]
            table.add_row(
                *(Text(cell, style="bold green" if (r, c) in self.best else "") for c, cell in enumerate(marked))
            )
        return table


def column_parts(widths: Sequence[int], fixed: int, width: int) -> list[list[int]]:
    """Return the columns of each part of a table: the first `fixed` ones in all, as many others as fit."""
    room, parts = width - sum(widths[:fixed]), list[list[int]]()
    used = 0
    for column in range(fixed, len(widths)):
        if not parts or used + widths[column] > room:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += widths[column]
    return [[*range(fixed), *part] for part in parts]


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
