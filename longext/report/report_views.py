"""Tables and notes of `longext report`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longext.report.build import Cell, Group, Report, Shown
from longext.report.comparable import Conflict, base_of
from longext.report.efficiency_views import size
from longext.report.suites import Column, View
from longext.report.tables import Table, number, percent

_WIDTH = 128  # characters of a table: what fits a terminal of 140 columns and the page
_FEW = 3  # labels that a note spells out
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONG = 40
_TASK_HASH = re.compile(r"data\.(references_)?sha256\.")
_SAID_BY_HASH = re.compile(r"data\.num_")
_NOT_TOLD = re.compile(r"protocol\.(id|definition|seed)$|versions\..*|model\..*|base\..*")

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
_SIGNED = ("signed", "change")


def unit_text(unit: str, value: float) -> str:
    """Return a number as a report writes those of its unit."""
    return _UNITS[unit](value)


def set_suffix(own: Group, report: Report) -> str:
    """Return " (set N)" where a suite has several sets of results that are not comparable, else ""."""
    several = sum(other.suite is own.suite for other in report.groups) > 1
    return f" (set {own.number})" if several else ""


def set_title(own: Group, report: Report) -> str:
    """Return the title of a section: its suite, and the set where the suite has several."""
    return f"{own.suite.title}{set_suffix(own, report)}"


# --- tables -----------------------------------------------------------------------------------------------------------


def report_tables(report: Report) -> list[Table]:
    """Return the tables of all sections in order; each title names its set where a suite has several."""
    tables = []
    for own in report.groups:
        for table in (table for shown in own.shown for table in shown_tables(own, shown)):
            tables.append(dataclasses.replace(table, title=f"{table.title}{set_suffix(own, report)}"))
    return tables


def shown_tables(own: Group, shown: Shown) -> list[Table]:
    """Return the numbers of one view as a table: a row for each result, or for each column where that is narrower.

    Intervals are left out where neither fits; what is still too wide is continued in further tables.
    """
    if not shown.view.in_table:
        return []
    has_intervals = any(cell.score.interval() for cell in shown.cells)
    ways = [(turned, True) for turned in (False, True)] if has_intervals else []
    ways += [(turned, False) for turned in (False, True)]
    layouts = [_Layout.of(own, shown, turned, intervals) for turned, intervals in ways]
    fitting = next((layout for layout in layouts if layout.width <= _WIDTH), None)
    return (fitting or min(layouts, key=lambda layout: layout.width)).table.parts(_WIDTH)


@dataclass(frozen=True)
class _Layout:
    """A table of any width.

    Attributes:
        fixed: how many columns stand at the left of every part of a table that is continued.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]]
    tied: frozenset[tuple[int, int]]
    fixed: int
    caption: str

    @staticmethod
    def of(own: Group, shown: Shown, turned: bool, intervals: bool) -> _Layout:
        """Lay the cells out: a row for each panel and label, or `turned`, for each panel and column."""
        view, cells = shown.view, shown.cells
        labels, panels = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("label", "panel"))
        columns = ordered_columns(cells)
        by_place = {(cell.panel, cell.label, cell.column): cell for cell in cells}
        lines: Sequence[Any] = columns if turned else labels
        heads: Sequence[Any] = labels if turned else columns
        rows: list[list[str]] = []
        best, tied = set[tuple[int, int]](), set[tuple[int, int]]()
        for panel in panels:
            first = True
            for line in lines:
                found = [by_place.get((panel, head, line) if turned else (panel, line, head)) for head in heads]
                if not any(found):
                    continue
                left = [panel if first else ""] if len(panels) > 1 else []
                left.append(view.spell(line) if turned else line)
                best |= {(len(rows), len(left) + i) for i, cell in enumerate(found) if cell and cell.is_best}
                tied |= {(len(rows), len(left) + i) for i, cell in enumerate(found) if cell and cell.is_tied}
                rows.append([*left, *(_text(cell, view, intervals) for cell in found)])
                first = False
        name = "" if turned else "run" if own.suite.unknown else "result"
        left_columns = [*([view.panel_name] if len(panels) > 1 else []), name]
        spelled = labels if turned else [view.spell(column) for column in columns]
        caption = _caption(own, shown, bool(best), bool(tied), intervals)
        marks = frozenset(best), frozenset(tied)
        return _Layout(view.title, [*left_columns, *spelled], rows, *marks, len(left_columns), caption)

    @property
    def table(self) -> Table:
        """Return it as a table of any width."""
        left = frozenset(range(self.fixed))
        return Table(self.title, self.columns, self.rows, self.best, left, self.caption, self.tied)

    @property
    def width(self) -> int:
        """Return the characters of a row."""
        return sum(self.table.widths)


def ordered_columns(cells: Sequence[Cell]) -> list[Column]:
    """Return the columns of a view: numbers by size, names as they come."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    return columns if any(isinstance(column, str) for column in columns) else sorted(columns, key=float)


def _text(cell: Cell | None, view: View, intervals: bool) -> str:
    if cell is None:
        return "-"
    between = cell.score.interval() if intervals else None
    value = unit_text(view.unit, cell.score.value)
    if between is None:
        return value
    low, high = (unit_text(view.unit, bound) for bound in between)
    return f"{value} ({low} to {high})" if view.unit in _SIGNED or between[0] < 0 else f"{value} ({low}-{high})"


def _caption(own: Group, shown: Shown, has_best: bool, has_ties: bool, intervals: bool) -> str:
    has_intervals = any(cell.score.interval() for cell in shown.cells)
    told = ["in brackets the 95% interval"] if has_intervals and intervals else []
    told += ["95% intervals are in results.csv"] if has_intervals and not intervals else []
    if shown.view.lower_is_better is not None:
        told.append("less is better" if shown.view.lower_is_better else "more is better")
    of_each = " of each base model" if len({base_of(part) for part in own.parts}) > 1 else ""
    told += [f"the best{of_each} is marked if its interval meets no other"] if has_best else []
    told += [f"~ shares the lead{of_each}: intervals meet"] if has_ties else []
    flagged = list(dict.fromkeys(note.field for note in own.cautions))
    told += [f"see the notes: {', '.join(flagged)}"] if flagged else []
    return "; ".join(told)


# --- notes ------------------------------------------------------------------------------------------------------------


def measured_note(own: Group) -> str:
    """Return protocol, data and settings that the results of a set share."""
    agreed = own.agreed
    known = {name: value for name, value in agreed.items() if not _NOT_TOLD.match(name) and name.count(".") == 1}
    told = {
        part: [_setting(name, value) for name, value in known.items() if name.startswith(part) and _is_set(value)]
        for part in ("protocol.", "measured.", "data.")
    }
    data = own.parts[0].record.get("data") or {}
    source = data.get("source") or data.get("data")
    where = [f"data {source}"] if source else []
    return "; ".join(
        [str(agreed.get("protocol.id", "")), *told["protocol."], *told["measured."], *where, *told["data."]]
    )


def _is_set(value: Any) -> bool:
    return value is not None and value != "" and value != []


def _setting(name: str, value: Any) -> str:
    short = name.partition(".")[2].removeprefix("num_").replace("_", " ")
    return (
        f"{short} {value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{short} {value_text(value)}"
    )


def definition_note(own: Group) -> str:
    """Return the definition of a set's protocol, as its results record it."""
    text = str((own.parts[0].record["protocol"] or {}).get("definition") or "")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def set_notes(own: Group, report: Report) -> list[str]:
    """Return why a set is not in the table of the first one, and what differs within it all the same."""
    notes = [own.suite.unknown] if own.suite.unknown else []
    if own.conflicts:
        notes.append(f"Not comparable with set 1, which has {'; '.join(_conflict_texts(own.conflicts))}.")
    silent: dict[tuple[str, ...], list[str]] = {}
    for caution in own.cautions:
        if caution.is_missing:
            silent.setdefault(tuple(caution.values[0][1]), []).append(caution.field)
            continue
        values = _shortened([(value_text(value), labels) for value, labels in caution.values], own)
        notes.append(f"{caution.field} differs: {', '.join(values)}.")
    for labels, names in silent.items():
        notes.append(f"{', '.join(names)}: not recorded by {_who(labels, own)}.")
    return notes


def _conflict_texts(conflicts: Sequence[Conflict]) -> Iterator[str]:
    """Yield "field value (here value)"; for the hashes of many tasks their number, and no counts beside a hash."""
    is_other_data = any(own.field.startswith("data.sha256") for own in conflicts)
    by_task = [own for own in conflicts if _TASK_HASH.match(own.field)]
    for own in conflicts:
        if is_other_data and _SAID_BY_HASH.match(own.field):
            continue
        if own not in by_task or len(by_task) <= _FEW:
            yield f"{own.field} {value_text(own.there)} (here {value_text(own.here)})"
    if len(by_task) > _FEW:
        tasks = {own.field.split(".", 2)[2] for own in by_task}
        yield f"other rows (data.sha256) of {len(tasks)} tasks"


def _shortened(values: Sequence[tuple[str, Sequence[str]]], own: Group) -> list[str]:
    """Return "value (who)" each, the rarest first; the most common is of "all others" where they are many."""
    rising = sorted(values, key=lambda pair: len(pair[1]))
    *rare, (common, holders) = rising
    is_rest = len(holders) > _FEW and sum(len(labels) for _, labels in rising) == len(own.labels)
    last = "all others" if is_rest else _who(holders, own)
    return [*(f"{value} ({_who(labels, own)})" for value, labels in rare), f"{common} ({last})"]


def _who(labels: Sequence[str], own: Group) -> str:
    """Return labels; the results they come from where these are fewer and hold no others."""
    names = [part.result.name for part, label in zip(own.parts, own.labels, strict=True) if label in labels]
    others = [part.result.name for part, label in zip(own.parts, own.labels, strict=True) if label not in labels]
    results = list(dict.fromkeys(names))
    return ", ".join(results if len(results) < len(labels) and not set(results) & set(others) else labels)


def report_notes(report: Report) -> list[str]:
    """Return the notes of all sets, and what was left out."""
    notes = [f"{set_title(own, report)}: {note}" for own in report.groups for note in set_notes(own, report)]
    return [*notes, *(f"Left out: {reason}" for reason in report.left_out)]


def value_text(value: Any) -> str:
    """Return a field's value in a few characters: hashes by their beginning."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if _SHA256.fullmatch(text):
        return text[:12]
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


# --- the page as Markdown ---------------------------------------------------------------------------------------------


def report_title(report: Report) -> str:
    """Return the title of a report."""
    count = f"{len(report.results)} result{'s' if len(report.results) > 1 else ''}"
    return f"{report.model}: {count}" if report.model else f"{count} side by side"


def to_markdown(report: Report, pictures: Mapping[tuple[str, int], Sequence[str]]) -> str:
    """Return the report as Markdown; `pictures` are the file names of each (suite, set)."""
    lines = [f"# {report_title(report)}", ""]
    for own in report.groups:
        told = [note for note in (definition_note(own), measured_note(own)) if note]
        lines += [f"## {set_title(own, report)}", "", *(f"{note}\n" for note in told)]
        for shown in own.shown:
            lines += [table.to_markdown() for table in shown_tables(own, shown)]
        lines += [f"- {note}" for note in set_notes(own, report)]
        lines += ["", *(f"![{own.suite.title}]({name})\n" for name in pictures.get((own.suite.name, own.number), ()))]
    lines += ["## Results", "", results_table(report).to_markdown()]
    lines += [f"- Left out: {reason}" for reason in report.left_out]
    return "\n".join(lines).rstrip().replace("<", "&lt;") + "\n"  # names and commands are text, no HTML


def results_table(report: Report) -> Table:
    """One row per result: where it lies, what it is, its bars where any has some, the command that made it."""
    bars = [_bars_text(own.record.get("bars") or []) for own in report.results]
    has_bars = any(bars)
    rows = [
        [own.name, str(own.record["kind"]), *([text or "-"] if has_bars else []), str(own.record.get("command") or "-")]
        for own, text in zip(report.results, bars, strict=True)
    ]
    columns = ["result", "kind", *(["bars"] if has_bars else []), "command"]
    return Table("What was read", columns, rows, left=frozenset(range(len(columns))))


def _bars_text(bars: Sequence[Mapping[str, Any]]) -> str:
    """Return how many bars (--fail-under and the like) a result reached, "" for none."""
    missed = [str(bar.get("name")) for bar in bars if not bar.get("passed")]
    if missed:
        return f"missed: {', '.join(missed)}"
    return f"{len(bars)} passed" if bars else ""
