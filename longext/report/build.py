"""`longext report`: results side by side, in tables of what is comparable, with the best of each place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from longext.evals.statistics import leaders
from longext.manifest import result_record
from longext.report.comparable import (
    Caution,
    Conflict,
    base_of,
    cautions,
    fields_of,
    group,
    group_conflicts,
    is_by_task,
    must_agree,
)
from longext.report.find import Part, Result, find_results, label_parts, model_names, parts_of
from longext.report.scores import Score, numbers_of
from longext.report.suites import SUITES, Column, Suite, View

_COUNTS = ("num_trials", "num_rows", "num_documents", "num_segments", "num_tokens")
_ROW_FIELDS = ("task", "method", "way", "content", "metric", "filter", "ratio", "start", "length", "depth")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a table.

    Attributes:
        label: of the result; with what tells its rows apart where it has several.
        is_best: the best of its column and panel among the results of its base model, told apart from all others.
        is_tied: it shares the lead there with others that it is not told apart from.
    """

    label: str
    panel: str
    column: Column
    score: Score
    part: Part
    is_best: bool = False
    is_tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A view with the numbers of one group of results."""

    view: View
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Results of a suite that are comparable.

    Attributes:
        number: 1, 2, ... within the suite.
        conflicts: what keeps them out of the first group.
        cautions: what differs all the same.
    """

    suite: Suite
    number: int
    parts: list[Part]
    labels: list[str]
    conflicts: list[Conflict]
    cautions: list[Caution]
    shown: list[Shown]

    @property
    def agreed(self) -> dict[str, Any]:
        """Return the fields of protocol, data and model that all results record and agree in."""
        held = [fields_of(part) for part in self.parts]
        return {
            name: value
            for name, value in held[0].items()
            if all(name in own and own[name] == value for own in held) or self._by_task(name)
        }

    def _by_task(self, name: str) -> bool:
        return is_by_task(name) and must_agree(name, self.suite)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `longext report` found.

    Attributes:
        model: the one that all results are of, "" where there are several.
        left_out: results that were found and cannot be shown, each with the reason.
    """

    results: list[Result]
    groups: list[Group]
    model: str
    left_out: list[str]

    @property
    def labels(self) -> list[str]:
        """Return every label, in the order of appearance."""
        return list(dict.fromkeys(cell.label for own in self.groups for shown in own.shown for cell in shown.cells))


def make_report(names: Sequence[str]) -> Report:
    """Read results and put side by side what is comparable.

    Args:
        names: result directories, directories of them, or result files.

    Raises:
        DataError: as `find_results`.
    """
    return build_report(*find_results(names))


def build_report(results: list[Result], left_out: list[str]) -> Report:
    """Return the report of results: what is comparable side by side; `left_out` are lines on what cannot be shown."""
    parts = [part for result in results for part in parts_of(result)]
    spelled = model_names(parts)
    groups = []
    for suite in SUITES.values():
        found = group([part for part in parts if part.suite is suite])
        groups += [_group(own, i, found[0], spelled) for i, own in enumerate(found, 1)]
    model = next(iter(spelled), "") if len(spelled) == 1 else ""
    return Report(results=results, groups=groups, model=model, left_out=left_out)


def _group(parts: list[Part], number: int, first: list[Part], spelled: dict[str, str]) -> Group:
    labels = label_parts(parts, spelled)
    suite = parts[0].suite
    shown = [Shown(view=view, cells=_cells(view, parts, labels)) for view in suite.views]
    places: dict[tuple[str, str, Column], list[tuple[Score, str]]] = {}
    for own in shown:
        for cell in own.cells:
            label = labels[parts.index(cell.part)]
            places.setdefault((own.view.name, cell.panel, cell.column), []).append((cell.score, label))
    return Group(
        suite=suite,
        number=number,
        parts=parts,
        labels=labels,
        conflicts=group_conflicts(parts, first) if number > 1 else [],
        cautions=cautions(parts, labels, places.values()),
        shown=[own for own in shown if own.cells],
    )


def _cells(view: View, parts: Sequence[Part], labels: Sequence[str]) -> list[Cell]:
    """Return the numbers of a view, the best marked; nothing where it pools tasks that are not the same everywhere."""
    if view.pooled and not _have_same_tasks(parts):
        return []
    cells = [
        Cell(
            label=f"{label}: {view.variant(score)}" if view.variant else label,
            panel=view.panel(score) if view.panel else "",
            column=view.column(score),
            score=score,
            part=part,
        )
        for part, label in zip(parts, labels, strict=True)
        for score in part.scores[view.name]
    ]
    told = {cell.panel for cell in cells if cell.column != view.lone}
    return _marked(view, [cell for cell in cells if cell.panel in told])


def _have_same_tasks(parts: Sequence[Part]) -> bool:
    """True where all results have the same tasks, and more than one."""
    tasks = [{score.field("task") for score in part.scores[""]} for part in parts]
    return len(tasks[0]) > 1 and all(own == tasks[0] for own in tasks)


def _marked(view: View, cells: list[Cell]) -> list[Cell]:
    """Return the cells with the best of each column and panel marked, among the results of each base model.

    One that its interval does not tell apart from others shares the lead with them.
    """
    places: dict[tuple[Any, ...], list[int]] = {}
    for i, cell in enumerate(cells):
        places.setdefault((cell.panel, cell.column, base_of(cell.part)), []).append(i)
    marked = list(cells)
    for indices in places.values():
        lower = view.is_lower_better(cells[indices[0]].score)
        if lower is None:
            continue
        estimates = [(cells[i].score.value, cells[i].score.interval()) for i in indices]
        best, tied = leaders(estimates, lower_is_better=lower, exact=view.exact)
        for place, i in enumerate(indices):
            marked[i] = replace(cells[i], is_best=place == best, is_tied=place in tied)
    return marked


# --- files ------------------------------------------------------------------------------------------------------------


def report_record(report: Report) -> dict[str, Any]:
    """Return the JSON record of a report."""
    return result_record(
        "report",
        results=[
            {"result": own.name, "kind": own.record["kind"], "command": own.record.get("command")}
            for own in report.results
        ],
        left_out=report.left_out,
        tables=[_table_record(own, shown) for own in report.groups for shown in own.shown],
    )


def _table_record(group: Group, shown: Shown) -> dict[str, Any]:
    return {
        "suite": group.suite.name,
        "table": group.number,
        "title": shown.view.title,
        "unit": shown.view.unit,
        "agreed": group.agreed,
        "not_comparable_with_table_1": [asdict(own) for own in group.conflicts],
        "cautions": [asdict(own) for own in group.cautions],
        "rows": [_cell_record(cell) for cell in shown.cells],
    }


def _cell_record(cell: Cell) -> dict[str, Any]:
    low, high = cell.score.interval() or (None, None)
    return {
        "label": cell.label,
        "result": cell.part.result.name,
        "score": cell.score.name,
        "panel": cell.panel,
        "column": cell.column,
        "value": cell.score.value,
        "low": low,
        "high": high,
        "best": cell.is_best,
        "tied": cell.is_tied,
    }


def csv_rows(report: Report) -> Iterator[list[Any]]:
    """Yield the header and one row for every number of every result, those included that no table shows."""
    held = [
        (own, part, label, score)
        for own in report.groups
        for part, label in zip(own.parts, own.labels, strict=True)
        for score in numbers_of(part.record)
        if not score.is_count
    ]
    fields = [name for name in _ROW_FIELDS if any(score.field(name) is not None for *_, score in held)]
    yield ["suite", "set", "label", "result", "score", *fields, "value", "low", "high", "count", "counted"]
    for own, part, label, score in held:
        low, high = score.interval() or (None, None)
        counted = next((name for name in _COUNTS if score.beside.get(name) is not None), "")
        yield [
            *(own.suite.name, own.number, label, part.result.name, score.name),
            *(score.field(name) for name in fields),
            *(score.value, low, high, score.beside.get(counted), counted),
        ]
