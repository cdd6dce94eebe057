"""Pictures of a report: lines over lengths with their intervals, dots for many results, bars, heat maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from longext.evals.views import Bars, HeatMap, Lines, View
from longext.report.build import Cell, Group, Report, Shown, is_made
from longext.report.find import Part
from longext.report.layout import cell_text, set_suffix, shown_title, size, unit_text
from longext.report.plots import INK, METHOD_COLOURS, TRAINED_DASHES, log_ticks, new_figure, style

WIDE, NARROW = 7.4, 4.0  # inches: a page on a screen, and on a phone (at 400 px text stays 11 px high)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b3e96", "#8c564b", "#b2912f")
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
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
_MOST_LINES = 8  # more lines cannot be followed: each length gets a panel, each result a row in it
_APART = 0.04  # octaves between intervals at most
_SPREAD = 0.24  # octaves of all of them together
_OVER = (0, (3, 2))  # dashes of a line that covers another, which shows between them
_CHARACTERS = 14  # of a legend in an inch
_ON_LIGHT = "#1a1a1a"  # numbers on light cells, in dark mode too


@dataclass(frozen=True)
class Look:
    """How the numbers of one label are drawn."""

    colour: str
    dashes: Any = "solid"
    marker: str = "o"


@dataclass
class Picture:
    """A figure with what a page needs of it.

    Attributes:
        tips: of the artists with id "tip-N": the text that explains a number, and the label it belongs to.
        labels: artists with id "series-N" belong to the N-th.
    """

    figure: Figure
    group: Group
    shown: Shown
    title: str
    looks: Mapping[str, Look]
    width: float
    tips: list[tuple[str, str]] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Return the labels that are drawn."""
        return self.shown.labels

    @property
    def alt(self) -> str:
        """Return what the picture shows, for those who cannot see it."""
        kind = {Bars: "bar chart", HeatMap: "heat map"}.get(type(self.shown.view), "line chart")
        columns = self.shown.columns
        spelled = [self.shown.view.spell(column) for column in columns]
        span = ", ".join(spelled) if len(spelled) <= 3 else f"{spelled[0]} to {spelled[-1]}"
        return f"{self.title}: {kind} of {', '.join(self.labels[:8])} at {span}. The table has the numbers."

    def tip(self, cell: Cell) -> str:
        """Return the id of an artist that shows a cell."""
        view = self.shown.view
        place = [cell.panel] if len(self.shown.panels) > 1 else []
        if isinstance(view, HeatMap):
            place.append(f"{view.rows_name} {view.spell_row(cell.row)}".strip())
        place.append(view.spell(cell.column))
        self.tips.append((f"{cell.label}, {', '.join(place)}: {cell_text(cell, view)}", cell.label))
        return f"tip-{len(self.tips) - 1}"

    def series(self, label: str) -> str:
        """Return the id of an artist that belongs to a label."""
        return f"series-{self.labels.index(label)}"


def report_pictures(report: Report, width: float = WIDE) -> dict[str, Picture]:
    """Return the pictures of a report by file name, in the order of its sections; `width` in inches."""
    everywhere = looks_of(report.groups)
    pictures: dict[str, Picture] = {}
    for group in report.groups:
        looks = everywhere if len(everywhere) <= len(_COLOURS) else looks_of([group])
        first = group.section.picture if group.is_single and group.section.picture else group.section.name
        drawn = list(_drawn(group))
        for i, shown in enumerate(drawn):
            ending = "" if group.is_single and i == 0 else shown.view.name
            name = "-".join(part for part in (first, ending, str(group.number) if group.number > 1 else "") if part)
            title = shown_title(group, shown) + set_suffix(group, report)
            picture = Picture(Figure(), group, shown, title, looks, width)
            picture.figure = _draw(picture)
            pictures[name] = picture
    return pictures


def _drawn(group: Group) -> Iterator[Shown]:
    """Yield the views that are drawn; no map by depth of prompts without one, if there is another picture."""
    made = [shown for shown in group.shown if is_made(shown.view.picture, group.is_single)]
    for shown in made:
        has_rows = not isinstance(shown.view, HeatMap) or any(cell.row is not None for cell in shown.cells)
        if has_rows or len(made) == 1:
            yield shown


def _draw(picture: Picture) -> Figure:
    view, shown = picture.shown.view, picture.shown
    if isinstance(view, HeatMap):
        return _maps(picture, view)
    if not isinstance(view, Lines):
        return _bars(picture)
    if len(shown.labels) > _MOST_LINES and len(shown.panels) == 1 and not view.steps:
        return _dots(picture)
    return _lines(picture, view)


def looks_of(groups: Sequence[Group]) -> dict[str, Look]:
    """Return a look for each label: the colour of its method, or the next one.

    More labels than colours, of several models: a colour for what was applied, dashes for the model.
    """
    owners = {cell.label: cell.part for group in groups for shown in group.shown for cell in shown.cells}
    models = list(dict.fromkeys(part.model for part in owners.values()))
    applied = {label: f"{part.method} + {part.memory}" for label, part in owners.items()}
    by_model = len(owners) > len(_COLOURS) and len(models) > 1
    keys = {label: applied[label] if by_model else label for label in owners}
    colours = _colours({keys[label]: part for label, part in owners.items()}, by_model or len(models) == 1)
    looks = {}
    for i, (label, part) in enumerate(owners.items()):
        turn = models.index(part.model) if by_model else i // len(_COLOURS)
        looks[label] = Look(colours[keys[label]], _DASHES[turn % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
    return looks


def _colours(parts: Mapping[str, Part], by_method: bool) -> dict[str, str]:
    """Return a colour for each key: `by_method`, that of its method in every picture if it is free; else another."""
    chosen: dict[str, str] = {}
    for key, part in parts.items():
        known = METHOD_COLOURS.get(part.method.split(" ")[0] or "none") if by_method and not part.memory else None
        if known is not None and known not in chosen.values():
            chosen[key] = known
    free = [colour for colour in _COLOURS if colour not in chosen.values()] or list(_COLOURS)
    others = [key for key in parts if key not in chosen]
    return {**chosen, **{key: free[i % len(free)] for i, key in enumerate(others)}}


def _titled(picture: Picture, width: float, height: float) -> Figure:
    """Return an empty figure with the title of a picture, in as many lines as it needs."""
    lines = textwrap.wrap(picture.title, int(11.5 * width))
    figure = new_figure(width, height + 0.18 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, color=INK)
    return figure


# --- lines ------------------------------------------------------------------------------------------------------------


def _lines(picture: Picture, view: Lines) -> Figure:
    """Draw a line for each label, one panel for each task; intervals shaded, or as bars if they are many."""
    group, shown = picture.group, picture.shown
    panels, labels, columns = shown.panels, shown.labels, shown.columns
    across = min(3, len(panels)) if picture.width > NARROW else 1
    down = -(-len(panels) // across)
    width = picture.width if across == 1 else 3.6
    rows = -(-len(labels) // _legend_columns(labels, width * across))
    figure = _titled(picture, width * across, (3.7 if down == 1 else 2.7) * down + 0.4 + 0.18 * rows)
    shared = view.unit in _PERCENT
    grid = figure.subplots(down, across, squeeze=False, sharey=shared, gridspec_kw={"wspace": 0.08})
    for i, axes in enumerate(grid.flat):
        if i >= len(panels):
            axes.axis("off")
            continue
        is_left, is_last = i % across == 0, i + across >= len(panels)
        style(axes, "", view.axis if is_last else "", _Y[view.unit] if is_left else "")
        axes.set_title(panels[i] if len(panels) > 1 else "", loc="left", fontsize=9.5, color=INK)
        _draw_panel(axes, picture, view, [cell for cell in shown.cells if cell.panel == panels[i]])
        _finish(axes, view, columns, width - 1.0)
    marks = _mark_lines([axes for axes in grid.flat if axes.axison], group, view, columns)
    _legend(picture, figure, grid[0][0], marks, width * across)
    return figure


def _draw_panel(axes: Any, picture: Picture, view: Lines, cells: Sequence[Cell]) -> None:
    columns = picture.shown.columns
    labels = list(dict.fromkeys(cell.label for cell in cells))
    is_band = len(labels) <= _BANDS
    step = 0.0 if is_band or view.steps else min(_APART, _SPREAD / len(labels))
    drawn: list[dict[Any, float]] = []
    for i, label in enumerate(labels):
        line = sorted((cell for cell in cells if cell.label == label), key=lambda cell: columns.index(cell.column))
        values = {cell.column: cell.score.value for cell in line}
        covers = any(_meet(values, other) for other in drawn)
        look = picture.looks[label]
        if covers and not step:
            look = replace(look, dashes=_OVER)
        drawn.append(values)
        if view.steps:
            _stairs(axes, picture, line, look)
        else:
            x = _places(columns, line, step * (i - (len(labels) - 1) / 2))
            _line(axes, picture, x, line, look, is_band=is_band)


def _meet(values: Mapping[Any, float], other: Mapping[Any, float]) -> bool:
    """True if two lines are the same between two neighbouring columns."""
    same = [column in other and math.isclose(value, other[column], rel_tol=1e-3) for column, value in values.items()]
    return any(a and b for a, b in pairwise(same))


def _places(columns: Sequence[Any], cells: Sequence[Cell], shift: float) -> list[float]:
    """Return x of each cell: its column's value (log axis), or its index if one is 0; `shift` in octaves."""
    if 0 in columns:
        return [columns.index(cell.column) + shift for cell in cells]
    return [float(cell.column) * 2**shift for cell in cells]


def _line(axes: Any, picture: Picture, x: Sequence[float], cells: Sequence[Cell], look: Look, *, is_band: bool) -> None:
    scale = 100.0 if picture.shown.view.unit in _PERCENT else 1.0
    y = [scale * cell.score.value for cell in cells]
    same = {"color": look.colour, "gid": picture.series(cells[0].label)}
    axes.plot(x, y, marker=look.marker, markersize=4.5, linewidth=1.9, linestyle=look.dashes, **same)
    intervals = [cell.score.interval() for cell in cells]
    if all(intervals):
        low, high = ([scale * pair[side] for pair in intervals if pair] for side in (0, 1))
        if is_band and len(x) > 1:
            axes.fill_between(x, low, high, alpha=0.14, linewidth=0, **same)
        else:
            axes.vlines(x, low, high, alpha=0.45, linewidth=1.4, **same)
    for place, value, cell in zip(x, y, cells, strict=True):
        _hit(axes, picture, place, value, cell)


def _hit(axes: Any, picture: Picture, x: float, y: float, cell: Cell) -> None:
    """Put an invisible point over a number: what a pointer meets on a page. It takes no part in the scales."""
    (point,) = axes.plot([x], [y], "o", markersize=13, alpha=0, color=INK, gid=picture.tip(cell))
    point.set_label("_")


def _stairs(axes: Any, picture: Picture, cells: Sequence[Cell], look: Look) -> None:
    rows = [cell.score.rows[-1] for cell in cells]
    edges = [rows[0]["start"], *(row["length"] for row in rows)]
    values = [cell.score.value for cell in cells]
    same = {"color": look.colour, "linestyle": look.dashes, "gid": picture.series(cells[0].label)}
    axes.stairs(values, edges, baseline=None, linewidth=1.9, **same)
    for row, value, cell in zip(rows, values, cells, strict=True):
        _hit(axes, picture, (row["start"] + row["length"]) / 2, value, cell)


def _finish(axes: Any, view: Lines, columns: Sequence[Any], width: float) -> None:
    """Give axes their scales, ticks and reference lines; `width` is that of the panel in inches."""
    if view.steps:
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
        log_ticks(axes)
    elif view.unit in _LOG:
        log_ticks(axes, size if view.unit == "bytes" else "{:g}".format)
    elif view.unit == "share":
        axes.set_ylim(-3, 103)
    elif view.unit in ("signed", "change"):
        axes.axhline(0, color=INK, linewidth=1)


def _mark_lines(panels: Sequence[Any], group: Group, view: View, columns: Sequence[Any]) -> dict[str, Any]:
    """Draw the trained length, if it is known and among the lengths, and the limit of a search; name -> line."""
    marks = {}
    trained, limit = group.trained_length, group.agreed.get("protocol.bar")
    for axes in panels:
        low, high = axes.get_xlim()
        if trained and "tokens" in view.axis_name and 0 not in columns and low <= trained <= high:
            line = axes.axvline(trained, color=INK, linewidth=1, linestyle=TRAINED_DASHES, zorder=1)
            marks[f"trained length {trained:,}"] = line
        if isinstance(limit, (int, float)):
            marks[f"limit, {limit:.0%}"] = axes.axhline(100 * limit, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    return marks


def _spread(columns: Sequence[Any], width: float) -> list[Any]:
    """Return the columns whose labels have room on a log axis of `width` inches."""
    span = math.log(columns[-1] / columns[0]) or 1.0
    shown: list[Any] = []
    for column in columns:
        if not shown or width * math.log(column / shown[-1]) / span >= _TICK:
            shown.append(column)
    return shown


def _legend(picture: Picture, figure: Figure, axes: Any, marks: Mapping[str, Any], width: float) -> None:
    """Put the labels below the panels, then the lines that are marked; no label that is alone."""
    looks = {label: picture.looks[label] for label in picture.labels} if len(picture.labels) > 1 else {}
    handles = {
        label: axes.plot(
            [], [], color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=4.5, linewidth=1.9
        )[0]
        for label, look in looks.items()
    }
    _put_below(picture, figure, {**handles, **marks}, width)


def _put_below(picture: Picture, figure: Figure, handles: Mapping[str, Any], width: float) -> None:
    if not handles:
        return
    legend = figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower left",
        ncols=_legend_columns(list(handles), width),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    for label, handle, text in zip(handles, legend.legend_handles, legend.get_texts(), strict=True):
        if label in picture.labels:
            for artist in filter(None, (handle, text)):
                artist.set_gid(picture.series(label))


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many labels have room in a row of `width` inches."""
    return max(1, min(len(labels), int(_CHARACTERS * width) // (max(map(len, labels)) + 7)))


# --- dots -------------------------------------------------------------------------------------------------------------


def _dots(picture: Picture) -> Figure:
    """Draw a panel for each column with a row for each label: its number and interval, the leaders filled."""
    shown, view = picture.shown, picture.shown.view
    columns, labels = shown.columns, shown.labels
    is_narrow = picture.width <= NARROW
    across = min(2 if is_narrow else 4, len(columns))
    down = -(-len(columns) // across)
    names = 0.065 * max(map(len, labels))
    height = (0.19 * len(labels) + 0.6) * down + 0.7
    figure = _titled(picture, picture.width if is_narrow else min(11.0, 1.9 * across + names), height)
    grid = figure.subplots(down, across, squeeze=False, sharey=True, sharex=True)
    scale = 100.0 if view.unit in _PERCENT else 1.0
    for i, axes in enumerate(grid.flat):
        if i >= len(columns):
            axes.axis("off")
            continue
        style(axes, "", _Y[view.unit] if i + across >= len(columns) else "", "")
        tokens = " tokens" if "tokens" in view.axis_name else ""
        axes.set_title(view.spell(columns[i]) + tokens, loc="left", fontsize=9, color=INK)
        for cell in (cell for cell in shown.cells if cell.column == columns[i]):
            _dot(axes, picture, cell, scale)
        axes.set_yticks(range(len(labels)), labels, fontsize=7.5 if is_narrow else 8.5)
        axes.grid(False, axis="y")
    axes = grid[0][0]
    axes.set_ylim(len(labels) - 0.4, -0.6)
    if view.unit == "perplexity":
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        steps = (1, 2, 5) if high / low < 30 else (1, 3) if high / low < 1000 else (1,)
        ticks = [m * 10**e for e in range(-1, 7) for m in steps if low <= m * 10**e <= high]
        for panel in grid.flat:
            panel.xaxis.set_major_locator(FixedLocator(ticks))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    elif view.unit == "share":
        axes.set_xlim(-4, 104)
    return figure


def _dot(axes: Any, picture: Picture, cell: Cell, scale: float) -> None:
    y, x = picture.labels.index(cell.label), scale * cell.score.value
    colour, gid = picture.looks[cell.label].colour, picture.series(cell.label)
    bounds = cell.score.interval()
    if bounds:
        axes.hlines(y, scale * bounds[0], scale * bounds[1], color=colour, linewidth=2.2, alpha=0.5, gid=gid)
    leads = cell.is_best or cell.is_tied
    face = colour if leads else "none"
    axes.plot([x], [y], "o", markersize=5.5, color=colour, markerfacecolor=face, markeredgewidth=1.4, gid=gid)
    _hit(axes, picture, x, y, cell)


# --- bars -------------------------------------------------------------------------------------------------------------


def _bars(picture: Picture) -> Figure:
    """Draw horizontal bars, grouped by task; numbers of different scales in panels of their own."""
    view, cells, labels = picture.shown.view, picture.shown.cells, picture.labels
    assert isinstance(view, Bars)
    kinds = [_text_of(view.scale, cell) for cell in cells]
    parts = {
        kind: [cell for cell, mine in zip(cells, kinds, strict=True) if mine == kind] for kind in dict.fromkeys(kinds)
    }
    thick = max(0.09, 0.2 - 0.015 * len(labels))
    heights = [(len(labels) * thick + 0.12) * len(_categories(part)) + 0.75 for part in parts.values()]
    colours = _bar_colours(picture, view)
    figure = _titled(picture, picture.width, sum(heights) + 0.6)
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, part) in zip(panels, parts.items(), strict=True):
        style(axes, "", kind or _Y[view.unit], "")
        _draw_bars(axes, picture, part, colours)
    shades = {name: colour for cell in cells for name, colour in [colours(cell)]}
    if len(shades) > 1:
        handles = {name: panels[0].barh(0, 0, color=colour) for name, colour in shades.items()}
        _put_below(picture, figure, handles, picture.width)
    return figure


def _text_of(reader: Any, cell: Cell) -> str:
    if reader is None:
        return ""
    value = cell.score.field(reader) if isinstance(reader, str) else reader(cell.score)
    return "" if value is None else str(value)


def _bar_colours(picture: Picture, view: Bars) -> Callable[[Cell], tuple[str, str]]:
    """Return cell -> (name in the legend, colour): by label; of a single result by the shade that the view names."""
    if not picture.group.is_single or view.shade is None:
        return lambda cell: (cell.label, picture.looks[cell.label].colour)
    names = list(dict.fromkeys(_text_of(view.shade, cell) for cell in picture.shown.cells))
    return lambda cell: (
        _text_of(view.shade, cell),
        _COLOURS[names.index(_text_of(view.shade, cell)) % len(_COLOURS)],
    )


def _categories(cells: Sequence[Cell]) -> list[str]:
    """Return what bars are grouped by: the columns, with their panel in front if there are several."""
    return list(dict.fromkeys(_category(cell, cells) for cell in cells))


def _category(cell: Cell, cells: Sequence[Cell]) -> str:
    several = len({other.panel for other in cells}) > 1
    return f"{cell.panel} {cell.column}" if several else str(cell.column)


def _draw_bars(axes: Any, picture: Picture, cells: Sequence[Cell], colours: Callable[[Cell], tuple[str, str]]) -> None:
    categories, labels = _categories(cells), picture.labels
    unit = picture.shown.view.unit
    height = 0.84 / len(labels)
    most = 100.0 if unit == "points" else 1.0 if all(0 <= cell.score.value <= 1 for cell in cells) else None
    for cell in cells:
        y = categories.index(_category(cell, cells)) - 0.42 + height * (labels.index(cell.label) + 0.5)
        value, bounds = cell.score.value, cell.score.interval()
        axes.barh(y, value, height * 0.92, color=colours(cell)[1], gid=picture.tip(cell))
        if bounds:
            low, high = (min(bound, most or math.inf) for bound in bounds)
            axes.hlines(y, low, high, color=INK, linewidth=1, alpha=0.7)
        at = min(max(value, bounds[1] if bounds else value), most or math.inf)
        text = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "color": INK}
        axes.annotate(unit_text(unit, value), (at, y), fontsize=7.5 if len(labels) < 4 else 6, **text)
    axes.set_yticks(range(len(categories)), categories, fontsize=8.5)
    axes.set_ylim(len(categories) - 0.45, -0.55)
    axes.grid(False, axis="y")
    if most:
        axes.set_xlim(0, 1.08 * most)
    else:
        axes.margins(x=0.12)


# --- heat maps --------------------------------------------------------------------------------------------------------


def _maps(picture: Picture, view: HeatMap) -> Figure:
    """Draw a map for each label and panel: rows by columns, the number written in each cell."""
    shown, columns = picture.shown, picture.shown.columns
    rows = list(dict.fromkeys(cell.row for cell in shown.cells))
    places = list(dict.fromkeys((cell.label, cell.panel) for cell in shown.cells))
    is_narrow = picture.width <= NARROW
    names = 0.075 * max(len(view.spell_row(row)) for row in rows) + 0.45
    title = 0.075 * max(len(", ".join(filter(None, place))) for place in places) if len(places) > 1 else 0
    wide = max(0.36 * len(columns) if is_narrow else 0.48 * len(columns), title) + 0.2
    across = max(1, min(len(places), int((picture.width + 1.2 * (not is_narrow) - names) // wide)))
    down = -(-len(places) // across)
    width = picture.width if is_narrow else max(picture.width * (len(places) == 1) * 0.8, across * wide + names + 0.2)
    figure = _titled(picture, width, (0.25 * len(rows) + 0.5) * down + 0.75)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for i, axes in enumerate(grid.flat):
        if i >= len(places):
            axes.axis("off")
            continue
        cells = [cell for cell in shown.cells if (cell.label, cell.panel) == places[i]]
        _draw_map(axes, picture, cells, rows)
        several = [places[i][0]] if len(shown.labels) > 1 else []
        axes.set_title(", ".join([*several, *filter(None, [places[i][1]])]), loc="left", fontsize=9, color=INK)
        is_last = i + across >= len(places)
        axes.set_xlabel("tokens" if is_last else "", fontsize=8.5, color=INK)
        axes.tick_params(length=0, colors=INK, labelsize=8, labelbottom=is_last)
        axes.tick_params(axis="x", labelrotation=45 if is_narrow else 0)
    axes = grid[0][0]
    spelled = [view.spell(column) for column in columns]
    axes.set_xticks([c + 0.5 for c in range(len(columns))], spelled)
    axes.set_yticks([r + 0.5 for r in range(len(rows))], [view.spell_row(row) for row in rows])
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    figure.supylabel(view.rows_name, fontsize=8.5, color=INK)
    return figure


def _draw_map(axes: Any, picture: Picture, cells: Sequence[Cell], rows: Sequence[Any]) -> None:
    from matplotlib import colormaps

    columns = picture.shown.columns
    for cell in cells:
        x, y, value = columns.index(cell.column), rows.index(cell.row), cell.score.value
        colour = colormaps["YlGnBu"](value)
        axes.add_patch(
            Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5, gid=picture.tip(cell))
        )
        ink = "white" if value > 0.55 else _ON_LIGHT
        axes.text(x + 0.5, y + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    for spine in axes.spines.values():
        spine.set_visible(False)
