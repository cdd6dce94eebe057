"""Pictures of `longext report`: lines over lengths and ratios with their intervals, bars over tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from longext.report.build import Cell, Group, Report, Shown
from longext.report.efficiency_views import size
from longext.report.find import Part
from longext.report.plots import INK, METHOD_COLOURS, log_perplexity, new_figure, style
from longext.report.report_views import ordered_columns, set_suffix, unit_text
from longext.report.suites import View

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b3e96", "#8c564b", "#b2912f")
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_DOTS = (0, (1, 2))
_MARKERS = ("o", "s", "^", "D", "v")
_PERCENT = ("share", "percent", "change")
_LOG = ("seconds", "bytes")
_Y = {
    "perplexity": "perplexity (log scale)",
    "share": "accuracy, %",
    "percent": "accuracy, %",
    "points": "score (0 to 100)",
    "nats": "nats per token",
    "signed": "nats per token",
    "change": "change of perplexity, %",
    "value": "value",
    "fraction": "",
    "seconds": "seconds (log scale)",
    "rate": "tokens a second",
    "bytes": "bytes (log scale)",
}
_TICK = 0.55  # inches between labels of lengths
_BANDS = 4  # more intervals than these would hide each other: they are drawn as bars, a little apart
_APART = 0.04  # octaves between them at most
_SPREAD = 0.24  # octaves of all of them together
_OVER = (0, (3, 2))  # dashes of a line that lies on another, which shows between them
_CHARACTERS = 14  # of a legend in an inch


@dataclass(frozen=True)
class Look:
    """How the numbers of one label are drawn."""

    colour: str
    dashes: Any = "solid"
    marker: str = "o"


def report_figures(report: Report) -> dict[tuple[str, int], dict[str, Figure]]:
    """Return the pictures of each (suite, set) by file name."""
    everywhere = _looks(report.groups)
    pictures: dict[tuple[str, int], dict[str, Figure]] = {}
    for own in report.groups:
        looks = everywhere if len(everywhere) <= len(_COLOURS) else _looks([own])
        key = (own.suite.name, own.number)
        for shown in (shown for shown in own.shown if shown.view.in_picture):
            parts = (own.suite.name, shown.view.name, str(own.number) if own.number > 1 else "")
            draw = _lines if shown.view.axis else _bars
            title = shown.view.title + set_suffix(own, report)
            pictures.setdefault(key, {})["-".join(part for part in parts if part)] = draw(own, shown, looks, title)
    return pictures


def _looks(groups: Sequence[Group]) -> dict[str, Look]:
    """Return a look for each label: the colour of its method, or the next one.

    More labels than colours, of several models: a colour for what was applied, dashes for the model.
    """
    owners = {cell.label: cell.part for own in groups for shown in own.shown for cell in shown.cells}
    models = list(dict.fromkeys(part.model for part in owners.values()))
    applied = {label: f"{part.method} + {part.memory}" for label, part in owners.items()}
    by_model = len(owners) > len(_COLOURS) and len(models) > 1
    keys = {label: applied[label] if by_model else label for label in owners}
    chosen = _colours({keys[label]: part for label, part in owners.items()}, by_model or len(models) == 1)
    looks = {}
    for i, (label, part) in enumerate(owners.items()):
        turn = models.index(part.model) if by_model else i // len(_COLOURS)
        looks[label] = Look(chosen[keys[label]], _DASHES[turn % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
    return looks


def _colours(parts: Mapping[str, Part], by_method: bool) -> dict[str, str]:
    """Return a colour for each key: `by_method`, that of its method in every picture where it is free; else another."""
    chosen: dict[str, str] = {}
    for key, part in parts.items() if len(parts) > 1 else ():
        own = METHOD_COLOURS.get(part.method.split(" ")[0] or "none") if by_method and not part.memory else None
        if own is not None and own not in chosen.values():
            chosen[key] = own
    free = [colour for colour in _COLOURS if colour not in chosen.values()] or list(_COLOURS)
    others = [key for key in parts if key not in chosen]
    return {**chosen, **{key: free[i % len(free)] for i, key in enumerate(others)}}


# --- lines ------------------------------------------------------------------------------------------------------------


def _lines(own: Group, shown: Shown, looks: Mapping[str, Look], title: str) -> Figure:
    """Draw a line for each label, one panel for each task; intervals shaded, or as bars where they are many."""
    view, cells = shown.view, shown.cells
    panels, labels = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("panel", "label"))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    width = 7.4 if across == 1 else 3.6
    rows = -(-len(labels) // _legend_columns(labels, width * across))
    figure = new_figure(width * across, (3.7 if down == 1 else 2.7) * down + 0.4 + 0.18 * rows)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    shared = view.unit in _PERCENT
    grid = figure.subplots(down, across, squeeze=False, sharey=shared, gridspec_kw={"wspace": 0.08})
    columns = ordered_columns(cells)
    for i, axes in enumerate(grid.flat):
        if i >= len(panels):
            axes.axis("off")
            continue
        is_left, is_last = i % across == 0, i + across >= len(panels)
        style(axes, "", view.axis if is_last else "", _Y[view.unit] if is_left else "")
        axes.set_title(panels[i] if len(panels) > 1 else "", loc="left", fontsize=9.5, color=INK)
        _draw_panel(axes, own, view, [cell for cell in cells if cell.panel == panels[i]], columns, looks)
        _finish(axes, own, view, columns, width - 1.0)
    marks = _mark_lines([axes for axes in grid.flat if axes.axison], own, view, columns)
    _legend(figure, grid[0][0], {label: looks[label] for label in labels}, marks, width * across)
    return figure


def _draw_panel(
    axes: Any, own: Group, view: View, cells: Sequence[Cell], columns: Sequence[Any], looks: Mapping[str, Look]
) -> None:
    labels = list(dict.fromkeys(cell.label for cell in cells))
    is_band = len(labels) <= _BANDS
    step = 0.0 if is_band or own.suite.name == "positions" else min(_APART, _SPREAD / len(labels))
    drawn: list[dict[Any, float]] = []
    for i, label in enumerate(labels):
        held = sorted((cell for cell in cells if cell.label == label), key=lambda cell: columns.index(cell.column))
        values = {cell.column: cell.score.value for cell in held}
        hides = any(_meet(values, other) for other in drawn)
        look = replace(looks[label], dashes=_OVER) if hides and not step else looks[label]
        drawn.append(values)
        if own.suite.name == "positions":
            _stairs(axes, held, look)
        else:
            x = _places(columns, held, step * (i - (len(labels) - 1) / 2))
            _line(axes, x, held, look, view, is_band=is_band)


def _meet(values: Mapping[Any, float], other: Mapping[Any, float]) -> bool:
    """True where two lines are the same between two neighbouring columns."""
    same = [column in other and math.isclose(value, other[column], rel_tol=1e-3) for column, value in values.items()]
    return any(a and b for a, b in pairwise(same))


def _places(columns: Sequence[Any], cells: Sequence[Cell], shift: float) -> list[float]:
    """Return where cells stand: at their column's value (log axis), or evenly where one is 0; `shift` in octaves."""
    if 0 in columns:
        return [columns.index(cell.column) + shift for cell in cells]
    return [float(cell.column) * 2**shift for cell in cells]


def _line(axes: Any, x: Sequence[float], cells: Sequence[Cell], look: Look, view: View, *, is_band: bool) -> None:
    scale = 100.0 if view.unit in _PERCENT else 1.0
    y = [scale * cell.score.value for cell in cells]
    axes.plot(x, y, marker=look.marker, markersize=4.5, linewidth=1.9, color=look.colour, linestyle=look.dashes)
    between = [cell.score.interval() for cell in cells]
    if any(pair is None for pair in between):
        return
    low, high = ([scale * pair[side] for pair in between if pair] for side in (0, 1))
    if is_band and len(x) > 1:
        axes.fill_between(x, low, high, color=look.colour, alpha=0.14, linewidth=0)
    else:
        axes.vlines(x, low, high, color=look.colour, alpha=0.45, linewidth=1.4)


def _stairs(axes: Any, cells: Sequence[Cell], look: Look) -> None:
    rows = [cell.score.rows[-1] for cell in cells]
    edges = [rows[0]["start"], *(row["length"] for row in rows)]
    values = [cell.score.value for cell in cells]
    axes.stairs(values, edges, baseline=None, color=look.colour, linestyle=look.dashes, linewidth=1.9)


def _finish(axes: Any, own: Group, view: View, columns: Sequence[Any], width: float) -> None:
    """Give axes their scales, ticks and reference lines; `width` is that of the panel in inches."""
    if own.suite.name == "positions":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    elif 0 in columns:
        axes.set_xticks(range(len(columns)), [view.spell(column) for column in columns])
    else:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(_spread(columns, width)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: view.spell(round(value))))
        room = 2 ** max(0.15, 0.05 * math.log2(columns[-1] / columns[0]))
        axes.set_xlim(columns[0] / room, columns[-1] * room)
    if view.unit == "perplexity":
        log_perplexity(axes)
    elif view.unit in _LOG:
        _log_ticks(axes, size if view.unit == "bytes" else "{:g}".format)
    elif view.unit == "share":
        axes.set_ylim(-3, 103)
    elif view.unit in ("signed", "change"):
        axes.axhline(0, color=INK, linewidth=1)


def _log_ticks(axes: Any, spell: Callable[[float], str]) -> None:
    """Log scale with round ticks, never narrower than a factor of two, so that small changes look small."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 2:
        low, high = (math.sqrt(low * high) * side for side in (2**-0.5, 2**0.5))
        axes.set_ylim(low, high)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10**e for e in exponents for m in ((1, 1.5, 2, 3, 5, 7) if high / low < 100 else (1, 3))]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spell(value)))


def _mark_lines(panels: Sequence[Any], own: Group, view: View, columns: Sequence[Any]) -> dict[str, Any]:
    """Draw the trained length, where it is known and among the lengths, and the bar of a search; name -> line."""
    marks = {}
    trained, bar = _trained_length(own), own.agreed.get("protocol.bar")
    for axes in panels:
        low, high = axes.get_xlim()
        if trained and "tokens" in view.axis and 0 not in columns and low <= trained <= high:
            marks[f"trained length {trained:,}"] = axes.axvline(trained, color=INK, linewidth=1, linestyle=_DOTS)
        if isinstance(bar, (int, float)):
            marks[f"bar, {bar:.0%}"] = axes.axhline(100 * bar, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    return marks


def _trained_length(own: Group) -> int | None:
    """Return the trained length where the results know it and agree."""
    known = set()
    for part in own.parts:
        rope = (part.record["model"] or {}).get("rope_parameters") or {}
        known.add(part.record.get("trained_length") or rope.get("original_max_position_embeddings") or 0)
    lengths = sorted(known - {0})
    return int(lengths[0]) if len(lengths) == 1 else None


def _spread(columns: Sequence[Any], width: float) -> list[Any]:
    """Return the columns whose labels have room beside each other on a log axis of `width` inches."""
    span = math.log(columns[-1] / columns[0]) or 1.0
    shown: list[Any] = []
    for column in columns:
        if not shown or width * math.log(column / shown[-1]) / span >= _TICK:
            shown.append(column)
    return shown


def _legend(figure: Figure, axes: Any, looks: Mapping[str, Look], marks: Mapping[str, Any], width: float) -> None:
    """Put the labels below the panels, then the lines that are marked; no label that is alone."""
    handles = {
        label: axes.plot(
            [], [], color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=4.5, linewidth=1.9
        )[0]
        for label, look in (looks.items() if len(looks) > 1 else ())
    }
    if handles or marks:
        _put_below(figure, {**handles, **marks}, width)


def _put_below(figure: Figure, handles: Mapping[str, Any], width: float) -> None:
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower left",
        ncols=_legend_columns(list(handles), width),
        frameon=False,
        fontsize=8.5,
    )


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many labels have room beside each other in `width` inches."""
    return max(1, min(len(labels), int(_CHARACTERS * width) // (max(map(len, labels)) + 7)))


# --- bars -------------------------------------------------------------------------------------------------------------


def _bars(own: Group, shown: Shown, looks: Mapping[str, Look], title: str) -> Figure:
    """Draw horizontal bars, grouped by task; numbers of different scales in panels of their own."""
    view, cells = shown.view, shown.cells
    scales = list(dict.fromkeys(view.scale(cell.score) if view.scale else "" for cell in cells))
    held = [[cell for cell in cells if not view.scale or view.scale(cell.score) == scale] for scale in scales]
    labels = list(dict.fromkeys(cell.label for cell in cells))
    thick = max(0.09, 0.2 - 0.015 * len(labels))
    heights = [(len(labels) * thick + 0.12) * len(_categories(part)) + 0.75 for part in held]
    figure = new_figure(7.4, sum(heights) + 0.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    panels = figure.subplots(len(held), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, part, scale in zip(panels, held, scales, strict=True):
        style(axes, "", scale or _Y[view.unit], "")
        _draw_bars(axes, view, part, labels, looks)
    if len(labels) > 1:
        _put_below(figure, {label: panels[0].barh(0, 0, color=looks[label].colour) for label in labels}, 7.4)
    return figure


def _categories(cells: Sequence[Cell]) -> list[str]:
    """Return what bars are grouped by: the columns, with their panel in front where there are several."""
    return list(dict.fromkeys(_category(cell, cells) for cell in cells))


def _category(cell: Cell, cells: Sequence[Cell]) -> str:
    several = len({other.panel for other in cells}) > 1
    return f"{cell.panel} {cell.column}" if several else str(cell.column)


def _draw_bars(axes: Any, view: View, cells: Sequence[Cell], labels: Sequence[str], looks: Mapping[str, Look]) -> None:
    categories = _categories(cells)
    height = 0.84 / len(labels)
    most = 100.0 if view.unit == "points" else 1.0 if all(0 <= cell.score.value <= 1 for cell in cells) else None
    for cell in cells:
        place = categories.index(_category(cell, cells))
        y = place - 0.42 + height * (labels.index(cell.label) + 0.5)
        value, between = cell.score.value, cell.score.interval()
        axes.barh(y, value, height * 0.92, color=looks[cell.label].colour)
        if between:
            low, high = (min(bound, most or math.inf) for bound in between)
            axes.hlines(y, low, high, color=INK, linewidth=1, alpha=0.7)
        at = min(max(value, between[1] if between else value), most or math.inf)
        text = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "color": INK}
        axes.annotate(unit_text(view.unit, value), (at, y), fontsize=7.5 if len(labels) < 4 else 6, **text)
    axes.set_yticks(range(len(categories)), categories, fontsize=8.5)
    axes.set_ylim(len(categories) - 0.45, -0.55)
    axes.grid(False, axis="y")
    if most:
        axes.set_xlim(0, 1.08 * most)
    else:
        axes.margins(x=0.12)
