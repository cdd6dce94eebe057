"""`longext report`: results side by side, in tables of what is comparable, with the best of each column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from longext.evals.base import EVALS
from longext.evals.statistics import leaders
from longext.evals.views import ALWAYS, NEVER, ONE, SEVERAL, Column, HeatMap, Score, Section, View, read
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
from longext.report.find import Part, Result, label_parts, model_names, parts_of, sections
from longext.report.scores import numbers_of

_COUNTS = ("num_trials", "num_rows", "num_documents", "num_segments", "num_tokens")
_ROW_FIELDS = ("task", "method", "way", "content", "metric", "filter", "ratio", "start", "length", "depth")
_BASELINE = "perplexity"  # the section whose results have a price at a short length


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a table.

    Attributes:
        label: of the result; with what tells its rows apart if it has several.
        row: of a heat map.
        is_best: the best of its column and panel among the results of its base model, told apart from all others.
        is_tied: it shares the lead there with others that it is not told apart from.
    """

    label: str
    panel: str
    column: Column
    score: Score
    part: Part
    row: Any = None
    is_best: bool = False
    is_tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A view with the numbers of one group of results."""

    view: View
    cells: list[Cell]

    @property
    def labels(self) -> list[str]:
        """Return the labels in order."""
        return list(dict.fromkeys(cell.label for cell in self.cells))

    @property
    def panels(self) -> list[str]:
        """Return the panels in order."""
        return list(dict.fromkeys(cell.panel for cell in self.cells))

    @property
    def columns(self) -> list[Column]:
        """Return the columns: numbers by size, names in order."""
        columns = list(dict.fromkeys(cell.column for cell in self.cells))
        return columns if any(isinstance(column, str) for column in columns) else sorted(columns, key=float)


@dataclass(frozen=True, kw_only=True)
class Price:
    """What each method costs in the window that the model was trained for.

    Attributes:
        length: the longest evaluated length that is not above the trained length.
        changes: label -> relative change of perplexity there against the unchanged model.
    """

    length: int
    changes: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Results of a section that are comparable.

    Attributes:
        number: 1, 2, ... within the section.
        conflicts: what keeps them out of the first group.
        cautions: what differs within the group.
        is_single: a report of one result, whose tables have details that those of several have no room for.
    """

    section: Section
    number: int
    parts: list[Part]
    labels: list[str]
    conflicts: list[Conflict]
    cautions: list[Caution]
    shown: list[Shown]
    is_single: bool

    @property
    def agreed(self) -> dict[str, Any]:
        """Return the fields of protocol, data and model that all results record and agree in."""
        fields = [fields_of(part) for part in self.parts]
        return {
            name: value
            for name, value in fields[0].items()
            if all(name in other and other[name] == value for other in fields) or self._by_task(name)
        }

    def _by_task(self, name: str) -> bool:
        return is_by_task(name) and must_agree(name, self.section)

    @property
    def trained_length(self) -> int | None:
        """Return the trained length if the results know it and agree."""
        known = set()
        for part in self.parts:
            model = part.record["model"] or {}
            rope = model.get("rope_parameters") or {}
            known.add(part.record.get("trained_length") or rope.get("original_max_position_embeddings") or 0)
            # an unscaled model was trained at the length that its config gives
            if not part.method and rope.get("rope_type") == "default":
                known.add(model.get("max_position_embeddings") or 0)
        lengths = sorted(known - {0})
        return int(lengths[0]) if len(lengths) == 1 else None

    @cached_property
    def price(self) -> Price | None:
        """Return the price of every method, None if one model is not measured with and without a method."""
        trained = self.trained_length
        if self.section.name != _BASELINE or not trained or not self.shown or len(self.parts) < 2:
            return None
        shown = self.shown[0]
        lengths = [column for column in shown.columns if isinstance(column, int) and column <= trained]
        plain = [part for part in self.parts if not part.method and not part.memory]
        if not lengths or len(plain) != 1 or len({base_of(part) for part in self.parts}) > 1:
            return None
        values = {cell.label: cell for cell in shown.cells if cell.column == lengths[-1]}
        base = next((cell.score.value for cell in values.values() if cell.part is plain[0]), None)
        if not base:
            return None
        return Price(length=lengths[-1], changes={name: cell.score.value / base - 1 for name, cell in values.items()})


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results side by side.

    Attributes:
        model: the one that all results are of, "" if there are several.
        left_out: results that were found and cannot be shown, each with the reason.
    """

    results: list[Result]
    groups: list[Group]
    model: str
    left_out: list[str]

    @property
    def labels(self) -> list[str]:
        """Return every label, in order."""
        return list(dict.fromkeys(label for group in self.groups for shown in group.shown for label in shown.labels))


def build_report(results: Sequence[Result], left_out: Sequence[str] = ()) -> Report:
    """Put side by side what is comparable; the results are in memory or come from `find_results`."""
    parts = [part for result in results for part in parts_of(result)]
    names = model_names(parts)
    groups = []
    for section in sections(EVALS.loaded()):
        found = group([part for part in parts if part.section.name == section.name])
        for i, members in enumerate(found, 1):
            groups.append(_group(members, i, found[0], names, is_single=len(results) == len(members) == 1))
    models = [name for name in names if name]
    model = models[0] if len(models) == 1 else ""
    return Report(results=list(results), groups=groups, model=model, left_out=list(left_out))


def _group(parts: list[Part], number: int, first: list[Part], names: Mapping[str, str], *, is_single: bool) -> Group:
    labels = label_parts(parts, names)
    section = parts[0].section
    shown = [Shown(view=view, cells=_cells(view, parts, labels, is_single)) for view in section.views]
    places: dict[tuple[str, str, Column], list[tuple[Score, str]]] = {}
    for one in shown:
        for cell in one.cells:
            if not isinstance(one.view, HeatMap):
                label = labels[parts.index(cell.part)]
                places.setdefault((one.view.name, cell.panel, cell.column), []).append((cell.score, label))
    return Group(
        section=section,
        number=number,
        parts=parts,
        labels=labels,
        conflicts=group_conflicts(parts, first) if number > 1 else [],
        cautions=cautions(parts, labels, places.values()),
        shown=[one for one in shown if one.cells],
        is_single=is_single,
    )


def is_made(when: str, is_single: bool) -> bool:
    """True if a table or picture that is made `when` is made for one result, or for several."""
    return when in (ALWAYS, ONE if is_single else SEVERAL)


def _cells(view: View, parts: Sequence[Part], labels: Sequence[str], is_single: bool) -> list[Cell]:
    """Return the numbers of a view, the best marked; nothing if it pools tasks that are not the same everywhere."""
    if view.pooled and not _have_same_tasks(parts):
        return []
    if not is_single and {view.table, view.picture} <= {ONE, NEVER}:
        return []
    cells = [
        Cell(
            label=_label(view, label, score, is_single),
            panel=read(view.panel, score) if view.panel else "",
            column=read(view.columns, score),
            row=read(view.rows, score) if isinstance(view, HeatMap) else None,
            score=score,
            part=part,
        )
        for part, label in zip(parts, labels, strict=True)
        for score in part.scores[view.name]
    ]
    panels = {cell.panel for cell in cells if cell.column != view.lone}
    cells = [cell for cell in cells if cell.panel in panels]
    return cells if isinstance(view, HeatMap) else _marked(view, cells)


def _label(view: View, label: str, score: Score, is_single: bool) -> str:
    """Return a row's label: the result, its variant, or both; a single result is named in the title."""
    if not view.variant:
        return label
    variant = read(view.variant, score)
    return str(variant) if is_single else f"{label}: {variant}"


def _have_same_tasks(parts: Sequence[Part]) -> bool:
    """True if all results have the same tasks, and more than one."""
    tasks = [{score.field("task") for score in part.scores[""]} for part in parts]
    return len(tasks[0]) > 1 and all(other == tasks[0] for other in tasks)


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
            {"result": result.name, "kind": result.record["kind"], "command": result.record.get("command")}
            for result in report.results
        ],
        left_out=report.left_out,
        tables=[
            _table_record(group, shown)
            for group in report.groups
            for shown in group.shown
            if not isinstance(shown.view, HeatMap)
        ],
    )


def _table_record(group: Group, shown: Shown) -> dict[str, Any]:
    return {
        "suite": group.section.name,
        "table": group.number,
        "title": shown.view.title,
        "unit": shown.view.unit,
        "agreed": group.agreed,
        "not_comparable_with_table_1": [asdict(conflict) for conflict in group.conflicts],
        "cautions": [asdict(caution) for caution in group.cautions],
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
    numbers = [
        (members, part, label, score)
        for members in report.groups
        for part, label in zip(members.parts, members.labels, strict=True)
        for score in numbers_of(part.record)
        if not score.is_count
    ]
    fields = [name for name in _ROW_FIELDS if any(score.field(name) is not None for *_, score in numbers)]
    yield ["suite", "set", "label", "result", "score", *fields, "value", "low", "high", "count", "counted"]
    for members, part, label, score in numbers:
        low, high = score.interval() or (None, None)
        counted = next((name for name in _COUNTS if score.parent.get(name) is not None), "")
        yield [
            *(members.section.name, members.number, label, part.result.name, score.name),
            *(score.field(name) for name in fields),
            *(score.value, low, high, score.parent.get(counted), counted),
        ]
