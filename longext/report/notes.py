"""What a report says in words: its verdict, what a set of results shares, and what differs in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longext.evals.views import Column, HeatMap, Lines
from longext.report.build import Cell, Group, Report, Shown
from longext.report.comparable import Conflict, base_of
from longext.report.layout import cell_text, set_title, unit_text
from longext.report.tables import Table

_AVERAGE = "average"
_AS_ABOVE = "as above"  # the results of a comparison have one command
_FEW = 3  # labels that a note spells out
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONG = 40
_TASK_HASH = re.compile(r"data\.(references_)?sha256\.")
_SAID_BY_HASH = re.compile(r"data\.num_")
_NOT_SHOWN = re.compile(r"protocol\.(id|definition|seed)$|versions\..*|model\..*|base\..*")
_NOUNS = {"perplexity": "perplexity", "nats": "loss", "change": "change of perplexity", "points": "score"}


def report_title(report: Report) -> str:
    """Return the title of a report: how many methods of one model are compared, else how many results."""
    labels = {frozenset(group.labels) for group in report.groups}
    methods = next(iter(labels)) if len(labels) == 1 else frozenset()
    number, noun = (len(methods), "method") if report.model and len(methods) > 1 else (len(report.results), "result")
    count = f"{number} {noun}{'s' if number > 1 else ''}"
    return f"{report.model}: {count}" if report.model else f"{count} side by side"


# --- verdict ----------------------------------------------------------------------------------------------------------


def verdict(report: Report) -> list[str]:
    """Return what the numbers say, a sentence or two for each set of results that are comparable.

    It reads the last column (the longest length) of a section's first view. Who leads, and who is not told apart from
    the leader, is what the tables mark: intervals that meet are a tie.
    """
    return [text for group in report.groups for text in _group_verdict(group, report)]


def _group_verdict(group: Group, report: Report) -> Iterator[str]:
    shown = next((one for one in group.shown if not isinstance(one.view, HeatMap)), None)
    if group.section.unknown or shown is None:
        return
    if len(shown.labels) == 1:
        yield _of_one(group, shown, report)
        return
    if shown.view.lower_is_better is None:
        return
    for base in dict.fromkeys(base_of(cell.part) for cell in shown.cells):
        cells = [cell for cell in shown.cells if base_of(cell.part) == base]
        yield from _of_panels(group, Shown(view=shown.view, cells=cells), report)


def _of_one(group: Group, shown: Shown, report: Report) -> str:
    """Return the first and the last number of a result."""
    ends = [shown.columns[0], shown.columns[-1]]
    cells = [next(cell for cell in shown.cells if cell.column == end) for end in dict.fromkeys(ends)]
    panel = f" ({cells[0].panel})" if len(shown.panels) > 1 else ""
    texts = [f"{cell_text(cell, shown.view)} {_place(cell, shown)}" for cell in cells]
    return f"{set_title(group, report)}{panel}: {shown.labels[0]} has {', '.join(texts)}."


def _of_panels(group: Group, shown: Shown, report: Report) -> Iterator[str]:
    if len(shown.labels) < 2:
        return
    for panel in shown.panels[:_FEW]:
        name = f"{set_title(group, report)}, {panel}" if len(shown.panels) > 1 else set_title(group, report)
        cells = [cell for cell in shown.cells if cell.panel == panel]
        columns = [[cell for cell in cells if cell.column == column] for column in _headline(shown)]
        several = [column for column in columns if len(column) > 1]
        if several and isinstance(shown.view, Lines):
            yield f"{name}: {_leaders(group, shown, several)}"
        elif several:
            yield from (f"{name}: {_leaders(group, shown, [column])}" for column in several)
    if len(shown.panels) > _FEW:
        yield f"{set_title(group, report)}: {len(shown.panels) - _FEW} more {shown.view.panel_name}s are in the table."


def _headline(shown: Shown) -> list[Column]:
    """Return the columns that a verdict is about: all lengths; of tasks their average, else the first few."""
    if isinstance(shown.view, Lines):
        return shown.columns
    return [_AVERAGE] if _AVERAGE in shown.columns else shown.columns[:_FEW]


def _leaders(group: Group, shown: Shown, columns: Sequence[Sequence[Cell]]) -> str:
    """Return who leads in the last column, and if nobody does, in the last one in which somebody does."""
    last = columns[-1]
    led = next((cells for cells in reversed(columns) if any(cell.is_best or cell.is_tied for cell in cells)), None)
    if led is last:
        return _lead(group, shown, last)
    lower = bool(shown.view.is_lower_better(last[0].score))
    ranked = sorted(last, key=lambda cell: cell.score.value)
    best = ranked[0] if lower else ranked[-1]
    place = _place(last[0], shown)
    if ranked[0].score.value == ranked[-1].score.value:
        return f"{place} all have {cell_text(best, shown.view)}."
    if not all(cell.score.interval() for cell in last):
        text = f"{place} {best.label} has the {_best(shown, lower)}, {cell_text(best, shown.view)}"
        return f"{text}{_plain(shown, last, [best])}; without intervals this is no lead."
    ends = list(dict.fromkeys(unit_text(shown.view.unit, cell.score.value) for cell in (ranked[0], ranked[-1])))
    text = f"{place} no result is told apart from the best ({' to '.join(ends)}): their intervals meet."
    return text if led is None else f"{text} {_lead(group, shown, led)[:1].upper()}{_lead(group, shown, led)[1:]}"


def _lead(group: Group, shown: Shown, cells: Sequence[Cell]) -> str:
    """Return who leads in a column, what the unchanged model has there, and what the leader costs when short."""
    lower = bool(shown.view.is_lower_better(cells[0].score))
    ranked = sorted(cells, key=lambda cell: cell.score.value, reverse=not lower)
    leading = [cell for cell in ranked if cell.is_best or cell.is_tied]
    best = cell_text(leading[0], shown.view)
    if len(leading) == 1:
        text = f"{leading[0].label} has the {_best(shown, lower)}, {best}"
    else:
        labels = [cell.label for cell in leading[:_FEW]]
        labels += [f"{len(leading) - _FEW} more"] if len(leading) > _FEW else []
        why = "" if shown.view.exact else " (their intervals meet)"
        text = f"{', '.join(labels[:-1])} and {labels[-1]} share the lead{why}, the first with {best}"
    return f"{_place(cells[0], shown)} {text}{_plain(shown, cells, leading)}.{_costs(group, leading)}"


def _best(shown: Shown, lower: bool) -> str:
    return f"{'lowest' if lower else 'best'} {_NOUNS.get(shown.view.unit, shown.view.value)}"


def _plain(shown: Shown, cells: Sequence[Cell], leading: Sequence[Cell]) -> str:
    """Return what the unchanged model has, if it is not among the leaders."""
    plain = [cell for cell in cells if not cell.part.method and not cell.part.memory]
    if len(plain) != 1 or plain[0] in leading or shown.view.variant:
        return ""
    return f"; the unchanged model has {cell_text(plain[0], shown.view)}"


def _costs(group: Group, leading: Sequence[Cell]) -> str:
    if group.price is None:
        return ""
    costs = [
        f"{group.price.changes[cell.label]:+.1%}" + (f" ({cell.label})" if len(leading) > 1 else "")
        for cell in leading
        if cell.label in group.price.changes and (cell.part.method or cell.part.memory)
    ]
    at = f"{group.price.length:,} tokens"
    return f" The price at {at}, against the unchanged model: {', '.join(costs)} perplexity." if costs else ""


def _place(cell: Cell, shown: Shown) -> str:
    spelled = shown.view.spell(cell.column)
    if not isinstance(shown.view, Lines):
        return f"for {spelled}"
    return f"at {spelled} tokens" if "tokens" in shown.view.axis else f"at {spelled}"


# --- what a set shares ------------------------------------------------------------------------------------------------


def measured_note(group: Group) -> str:
    """Return protocol, data and settings that the results of a set share."""
    agreed = group.agreed
    known = {name: value for name, value in agreed.items() if not _NOT_SHOWN.match(name) and name.count(".") == 1}
    settings = {
        part: [_setting(name, value) for name, value in known.items() if name.startswith(part) and _is_set(value)]
        for part in ("protocol.", "measured.", "data.")
    }
    data = group.parts[0].record.get("data") or {}
    source = data.get("source") or data.get("data")
    named = [f"data {source}"] if source else []
    parts = [str(agreed.get("protocol.id", "")), *settings["protocol."], *settings["measured."], *named]
    return "; ".join([*parts, *settings["data."]])


def _is_set(value: Any) -> bool:
    return value is not None and value != "" and value != []


def _setting(name: str, value: Any) -> str:
    short = name.partition(".")[2].removeprefix("num_").replace("_", " ")
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{short} {value:,}" if is_count else f"{short} {value_text(value)}"


def definition_note(group: Group) -> str:
    """Return the definition of a set's protocol, as its results record it."""
    text = str((group.parts[0].record["protocol"] or {}).get("definition") or "")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


# --- what differs -----------------------------------------------------------------------------------------------------


def set_notes(group: Group, report: Report) -> list[str]:
    """Return why a set is not in the table of the first one, and what differs within it."""
    notes = [group.section.unknown] if group.section.unknown else []
    if group.conflicts:
        notes.append(f"Not comparable with set 1, which has {'; '.join(_conflict_texts(group.conflicts))}.")
    silent: dict[tuple[str, ...], list[str]] = {}
    for caution in group.cautions:
        if caution.is_missing:
            silent.setdefault(tuple(caution.values[0][1]), []).append(caution.field)
            continue
        values = _shortened([(value_text(value), labels) for value, labels in caution.values], group)
        notes.append(f"{caution.field} differs: {', '.join(values)}.")
    for labels, names in silent.items():
        notes.append(f"{', '.join(names)}: not recorded by {_who(labels, group)}.")
    return notes


def _conflict_texts(conflicts: Sequence[Conflict]) -> Iterator[str]:
    """Yield "field value (here value)"; for the hashes of many tasks their number, and no counts besides a hash."""
    is_other_data = any(conflict.field.startswith("data.sha256") for conflict in conflicts)
    by_task = [conflict for conflict in conflicts if _TASK_HASH.match(conflict.field)]
    for conflict in conflicts:
        if is_other_data and _SAID_BY_HASH.match(conflict.field):
            continue
        if conflict not in by_task or len(by_task) <= _FEW:
            yield f"{conflict.field} {value_text(conflict.there)} (here {value_text(conflict.here)})"
    if len(by_task) > _FEW:
        tasks = {conflict.field.split(".", 2)[2] for conflict in by_task}
        yield f"other rows (data.sha256) of {len(tasks)} tasks"


def _shortened(values: Sequence[tuple[str, Sequence[str]]], group: Group) -> list[str]:
    """Return "value (who)" each, the rarest first; the most common is of "all others" if they are many."""
    rising = sorted(values, key=lambda pair: len(pair[1]))
    *rare, (common, holders) = rising
    is_rest = len(holders) > _FEW and sum(len(labels) for _, labels in rising) == len(group.labels)
    last = "all others" if is_rest else _who(holders, group)
    return [*(f"{value} ({_who(labels, group)})" for value, labels in rare), f"{common} ({last})"]


def _who(labels: Sequence[str], group: Group) -> str:
    """Return labels; the results they come from if these are fewer and hold no others."""
    names = [part.result.name for part, label in zip(group.parts, group.labels, strict=True) if label in labels]
    others = [part.result.name for part, label in zip(group.parts, group.labels, strict=True) if label not in labels]
    results = list(dict.fromkeys(names))
    return ", ".join(results if len(results) < len(labels) and not set(results) & set(others) else labels)


def report_notes(report: Report) -> list[str]:
    """Return the notes of all sets, and what was left out."""
    notes = [f"{set_title(group, report)}: {note}" for group in report.groups for note in set_notes(group, report)]
    return [*notes, *(f"Left out: {reason}" for reason in report.left_out)]


def value_text(value: Any, length: int = _LONG) -> str:
    """Return a field's value in a few characters: hashes by their beginning."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if _SHA256.fullmatch(text):
        return text[:12]
    return text if len(text) <= length else f"{text[: length - 3]}..."


# --- what was read ----------------------------------------------------------------------------------------------------


def results_table(report: Report) -> Table:
    """One row per result: its directory, its kind, its limits if any has some, the command that made it."""
    commands = [str(result.record.get("command") or "-") for result in report.results]
    limits = [_limits_text(result.record.get("bars") or []) for result in report.results]
    has_limits = any(limits)
    rows = [
        [
            result.name,
            str(result.record["kind"]),
            *([text or "-"] if has_limits else []),
            _AS_ABOVE if i and command == commands[i - 1] and command != "-" else command,
        ]
        for i, (result, text, command) in enumerate(zip(report.results, limits, commands, strict=True))
    ]
    columns = ["result", "kind", *(["limits"] if has_limits else []), "command"]
    return Table("What was read", columns, rows, left=frozenset(range(len(columns))))


def _limits_text(limits: Sequence[Mapping[str, Any]]) -> str:
    """Return how many limits (--fail-under and the like) a result reached, "" for none."""
    missed = [str(limit.get("name")) for limit in limits if not limit.get("passed")]
    if missed:
        return f"missed: {', '.join(missed)}"
    return f"{len(limits)} passed" if limits else ""
