"""Tables of a report: cells laid out as rows and columns that fit a width."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longext.evals.views import HeatMap, View
from longext.report.build import Cell, Group, Report, Shown, is_made
from longext.report.comparable import base_of
from longext.report.tables import Table, number, percent

WIDTH = 128  # characters of a table: what fits a terminal of 140 columns and the page
_SIGNED = ("signed", "change")
_INTERVAL = "95% interval"
_Places = frozenset[tuple[int, int]]


def size(count: float) -> str:
    """Return bytes in a unit that leaves few digits (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


_UNITS: dict[str, Callable[[float], str]] = {
    "perplexity": number,
    "share": percent,
    "percent": lambda value: f"{value:.1%}",
    "points": lambda value: f"{value:.2f}",
    "nats": lambda value: f"{value:.3f}",
    "signed": lambda value: f"{value:+.3f}",
    "change": lambda value: f"{value:+.2%}",
    "count": lambda value: f"{value:,.0f}",
    "value": lambda value: f"{value:.4f}" if abs(value) < 10 else number(value),
    "fraction": lambda value: f"{value:.3f}",
    "seconds": lambda value: f"{value:.3g}",
    "rate": lambda value: f"{value:,.1f}",
    "bytes": size,
}


def unit_text(unit: str, value: float) -> str:
    """Return a number as a report writes those of its unit."""
    return _UNITS[unit](value)


def interval_text(cell: Cell, view: View) -> str:
    """Return "low-high" of a cell, or "low to high" if a sign would read as a dash; "" without an interval."""
    bounds = cell.score.interval()
    if bounds is None:
        return ""
    low, high = (unit_text(view.unit, bound) for bound in bounds)
    return f"{low} to {high}" if view.unit in _SIGNED or bounds[0] < 0 else f"{low}-{high}"


def cell_text(cell: Cell | None, view: View, *, with_interval: bool = True) -> str:
    """Return a cell as a table writes it: "43.53 (41.20-45.90)"; "-" if there is none."""
    if cell is None:
        return "-"
    between = interval_text(cell, view) if with_interval else ""
    value = unit_text(view.unit, cell.score.value)
    return f"{value} ({between})" if between else value


def set_suffix(group: Group, report: Report) -> str:
    """Return " (set N)" if a section has several sets of results that are not comparable, else ""."""
    several = sum(other.section is group.section for other in report.groups) > 1
    return f" (set {group.number})" if several else ""


def set_title(group: Group, report: Report) -> str:
    """Return the title of a section, and its set if it has several."""
    return f"{group.section.title}{set_suffix(group, report)}"


def shown_title(group: Group, shown: Shown) -> str:
    """Return the title of a view; of a single result with its name and protocol."""
    if not group.is_single:
        return shown.view.title
    protocol = (group.parts[0].record["protocol"] or {}).get("id")
    return f"{shown.view.title}: {group.labels[0]}" + (f" ({protocol})" if protocol else "")


# --- tables -----------------------------------------------------------------------------------------------------------


def report_tables(report: Report) -> list[Table]:
    """Return the tables of all sections in order; each title names its set if a section has several."""
    return [
        dataclasses.replace(table, title=f"{table.title}{set_suffix(group, report)}")
        for group in report.groups
        for shown in group.shown
        for table in shown_tables(group, shown)
    ]


def shown_tables(group: Group, shown: Shown) -> list[Table]:
    """Return the table of a view; what is wider than `WIDTH` is continued in further tables."""
    table = shown_table(group, shown, WIDTH)
    return table.parts(WIDTH) if table else []


def shown_table(group: Group, shown: Shown, width: int) -> Table | None:
    """Return the numbers of one view as a table, None if it has none.

    It has a row for each result, or for each column if only that fits `width` characters; intervals are left out if
    neither fits. The table of a single result has a row for each number, with the details of the view.
    """
    if not is_made(shown.view.table, group.is_single):
        return None
    if isinstance(shown.view, HeatMap):
        return _map_table(group, shown)
    if group.is_single and shown.view.details:
        return _detailed_table(group, shown)
    has_intervals = any(cell.score.interval() for cell in shown.cells)
    ways = [(turned, True) for turned in (False, True)] if has_intervals else []
    ways += [(turned, False) for turned in (False, True)]
    layouts = [_Layout.of(group, shown, turned, intervals) for turned, intervals in ways]
    fitting = next((layout for layout in layouts if layout.width <= width), None)
    return (fitting or min(layouts, key=lambda layout: layout.width)).table


def _map_table(group: Group, shown: Shown) -> Table:
    """Return a single result's heat map as a table."""
    view, columns = shown.view, shown.columns
    assert isinstance(view, HeatMap)
    by_place = {(cell.panel, cell.row, cell.column): cell for cell in shown.cells}
    rows = [
        [*([panel] if view.panel else []), view.spell_row(row)]
        + [cell_text(by_place.get((panel, row, column)), view, with_interval=False) for column in columns]
        for panel, row in dict.fromkeys((cell.panel, cell.row) for cell in shown.cells)
    ]
    heads = [*([view.panel_name] if view.panel else []), view.rows_name, *map(view.spell, columns)]
    return Table(shown_title(group, shown), heads, rows, left=frozenset({0, 1} if view.panel else {0}))


def _detailed_table(group: Group, shown: Shown) -> Table:
    """Return one row for each number of a single result, with the view's details; empty columns are left out."""
    view, cells = shown.view, shown.cells
    left = [
        (view.panel_name, [cell.panel for cell in cells] if view.panel else []),
        ("", [cell.label for cell in cells] if view.variant else []),
        (view.heading, [view.spell(cell.column) for cell in cells]),
    ]
    right = [
        (view.value, [unit_text(view.unit, cell.score.value) for cell in cells]),
        (_INTERVAL, [interval_text(cell, view) or "-" for cell in cells]),
        *((detail.heading, [detail.text(cell.score) for cell in cells]) for detail in view.details),
    ]
    left = [(heading, texts) for heading, texts in left if texts]
    right = [(heading, texts) for heading, texts in right if set(texts) != {"-"}]
    names, texts = zip(*left, *right, strict=True)
    place = len(left)
    resampled = {cell.score.field("resampled") for cell in cells} - {None}
    notes = [
        *([f"interval: bootstrap over {', '.join(sorted(resampled))}"] if resampled else []),
        *_mark_notes(group, cells),
        *([view.note] if view.note else []),
    ]
    return Table(
        shown_title(group, shown),
        names,
        list(map(list, zip(*texts, strict=True))),
        frozenset((r, place) for r, cell in enumerate(cells) if cell.is_best),
        frozenset(range(place)) | {c for c, column in enumerate(texts) if not any(map(_has_digit, column))},
        "; ".join(notes),
        frozenset((r, place) for r, cell in enumerate(cells) if cell.is_tied),
    )


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


@dataclass(frozen=True)
class _Layout:
    """A table of any width; the first `fixed` columns are repeated in every part of a table that is continued."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: _Places
    tied: _Places
    fixed: int
    caption: str

    @staticmethod
    def of(group: Group, shown: Shown, turned: bool, intervals: bool) -> _Layout:
        """Lay the cells out: a row for each panel and label, or `turned`, for each panel and column."""
        view, labels, panels, columns = shown.view, shown.labels, shown.panels, shown.columns
        by_place = {(cell.panel, cell.label, cell.column): cell for cell in shown.cells}
        lines: Sequence[Any] = columns if turned else labels
        heads: Sequence[Any] = labels if turned else columns
        # a single result is named in the title: its rows are the tasks
        has_lines = turned or not (group.is_single and len(panels) > 1 and len(lines) == 1)
        rows: list[list[str]] = []
        best, tied = set[tuple[int, int]](), set[tuple[int, int]]()
        for panel in panels:
            first = True
            for line in lines:
                cells = [by_place.get((panel, head, line) if turned else (panel, line, head)) for head in heads]
                if not any(cells):
                    continue
                left = [panel if first else ""] if len(panels) > 1 else []
                left += [view.spell(line) if turned else line] if has_lines else []
                best |= {(len(rows), len(left) + i) for i, cell in enumerate(cells) if cell and cell.is_best}
                tied |= {(len(rows), len(left) + i) for i, cell in enumerate(cells) if cell and cell.is_tied}
                rows.append([*left, *(cell_text(cell, view, with_interval=intervals) for cell in cells)])
                first = False
        name = "" if turned else "run" if group.section.unknown else "result"
        left_columns = [*([view.panel_name] if len(panels) > 1 else []), *([name] if has_lines else [])]
        spelled = labels if turned else [view.spell(column) for column in columns]
        _add_price(group, shown, rows, spelled, turned)
        caption = _caption(group, shown, intervals)
        marks = frozenset(best), frozenset(tied)
        title = shown_title(group, shown)
        return _Layout(title, [*left_columns, *spelled], rows, *marks, len(left_columns), caption)

    @property
    def table(self) -> Table:
        """Return it as a table of any width."""
        left = frozenset(range(self.fixed))
        return Table(self.title, self.columns, self.rows, self.best, left, self.caption, self.tied)

    @property
    def width(self) -> int:
        """Return the characters of a row."""
        return self.table.width


def _add_price(group: Group, shown: Shown, rows: list[list[str]], columns: list[str], turned: bool) -> None:
    """Add what each method costs at the longest length within the trained one: a column, or `turned` a row."""
    price = group.price
    if price is None or shown is not group.shown[0]:
        return
    texts = [f"{price.changes[label]:+.1%}" if label in price.changes else "-" for label in shown.labels]
    name = f"price at {price.length:,}"
    if turned:
        rows.append([name, *texts])
    else:
        columns.append(name)
        for row, text in zip(rows, texts, strict=True):
            row.append(text)


def _caption(group: Group, shown: Shown, intervals: bool) -> str:
    has_intervals = any(cell.score.interval() for cell in shown.cells)
    notes = [_count_note(shown)] if group.is_single and shown.view.per_cell else []
    notes += ["in brackets the 95% interval"] if has_intervals and intervals else []
    notes += ["95% intervals are in results.csv"] if has_intervals and not intervals else []
    if shown.view.lower_is_better is not None and not group.is_single:
        notes.append("less is better" if shown.view.lower_is_better else "more is better")
    notes += _mark_notes(group, shown.cells)
    if group.price is not None and shown is group.shown[0]:
        notes.append("price: change of perplexity against the unchanged model")
    flagged = list(dict.fromkeys(caution.field for caution in group.cautions))
    notes += [f"see the notes: {', '.join(flagged)}"] if flagged else []
    notes += [shown.view.note] if group.is_single and shown.view.note else []
    return "; ".join(notes)


def _count_note(shown: Shown) -> str:
    """Return how much is behind each number: "10 prompts a cell", or the least and the most."""
    assert shown.view.per_cell
    what, name = shown.view.per_cell
    counts = sorted({cell.score.field(name) for cell in shown.cells})
    return f"{' to '.join(f'{count:,}' for count in dict.fromkeys((counts[0], counts[-1])))} {what} a cell"


def _mark_notes(group: Group, cells: Sequence[Cell]) -> list[str]:
    of_each = " of each base model" if len({base_of(part) for part in group.parts}) > 1 else ""
    has_best, has_ties = any(cell.is_best for cell in cells), any(cell.is_tied for cell in cells)
    best = [f"the best{of_each} is marked if its interval meets no other"] if has_best else []
    return best + ([f"~ shares the lead{of_each}: intervals meet"] if has_ties else [])
