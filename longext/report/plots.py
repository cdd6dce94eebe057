"""Pictures as matplotlib figures, each saved as PNG beside its JSON; the same figures go into HTML as SVG."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a model is a $

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator  # noqa: E402

from longext.rope.spec import ROPE_METHODS  # noqa: E402

# One colour per method, the same in every picture; readable for the colour-blind (Okabe and Ito, extended).
METHOD_COLOURS = {name: ROPE_METHODS[name].colour for name in ROPE_METHODS if ROPE_METHODS[name].colour}
_SPARE = ("#5b3e96", "#117733", "#882255", "#44aa99", "#999933")
INK, GRID = "#222222", "#e3e3e3"


def colours_for(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each method spelled `name` or `name:key=value`; variants take spare colours."""
    spare = itertools.cycle(_SPARE)
    return {name: METHOD_COLOURS.get(name) or next(spare) for name in names}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this project's look, sizes in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def style(axes: Any, title: str, x: str, y: str) -> None:
    """Give axes a title, labels and this project's look."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _length_ticks(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_perplexity(axes: Any) -> None:
    """Log scale with round ticks; never narrower than a factor of two, so that small changes look small."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if not 0 < low < high:  # nothing that can be drawn, as of a model whose logits are NaN
        low, high = 1.0, 10.0
        axes.set_ylim(low, high)
    if high / low < 2:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(2), middle * math.sqrt(2)
        axes.set_ylim(low, high)
    nice = [m * 10**e for e in range(-1, 7) for m in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in nice if low <= tick <= high]
    if len(ticks) < 4:
        ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 20 else f"{value:g}"))


def _mark_trained(axes: Any, trained: int) -> None:
    axes.axvline(trained, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"trained length {trained:,}",
        (trained, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=INK,
    )


def _legend(axes: Any) -> None:
    figure, count = axes.get_figure(), len(axes.get_legend_handles_labels()[1])
    figure.set_figheight(max(figure.get_figheight(), 0.6 + 0.2 * count))  # tall enough for every variant's name
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))


def perplexity_by_length(series: Mapping[str, Sequence[Mapping[str, Any]]], *, trained: int, title: str) -> Figure:
    """Perplexity against context length, one line per series, 95 % intervals shaded; log-log.

    Args:
        series: name -> result rows with length, ppl, ppl_low, ppl_high.
    """
    figure = new_figure(7.4, 4.2)
    axes = figure.subplots()
    colours = colours_for(list(series)) if len(series) > 1 else dict.fromkeys(series, METHOD_COLOURS["yarn"])
    for name, rows in series.items():
        x = [row["length"] for row in rows]
        axes.plot(
            x, [row["ppl"] for row in rows], marker="o", markersize=4.5, linewidth=1.9, color=colours[name], label=name
        )
        if all(row["ppl_low"] is not None for row in rows):
            low, high = ([row[key] for row in rows] for key in ("ppl_low", "ppl_high"))
            axes.fill_between(x, low, high, color=colours[name], alpha=0.14, linewidth=0)
    style(axes, title, "context length (tokens)", "perplexity (log scale)")
    _length_ticks(axes, sorted({row["length"] for rows in series.values() for row in rows}))
    log_perplexity(axes)
    _mark_trained(axes, trained)
    if len(series) > 1:
        _legend(axes)
    return figure


def nll_by_position(series: Mapping[str, Sequence[Mapping[str, Any]]], *, trained: int, title: str) -> Figure:
    """NLL against position in the window, one step line per series.

    Args:
        series: name -> rows with start, length (end of the bucket) and nll.
    """
    figure = new_figure(7.4, 4.2)
    axes = figure.subplots()
    colours = colours_for(list(series)) if len(series) > 1 else dict.fromkeys(series, METHOD_COLOURS["yarn"])
    for name, rows in series.items():
        edges = [rows[0]["start"], *(row["length"] for row in rows)]
        # dynamic NTK equals NTK-aware at the full window: dashes let the line under it show
        dashes = (0, (3, 1.5)) if name.startswith("dynamic") else "solid"
        values = [row["nll"] for row in rows]
        axes.stairs(values, edges, baseline=None, color=colours[name], linewidth=1.9, linestyle=dashes, label=name)
    style(axes, title, "position in the window (tokens)", "NLL (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _mark_trained(axes, trained)
    if len(series) > 1:
        _legend(axes)
    return figure


def passkey_heat_maps(cells: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str) -> Figure:
    """Accuracy by length (columns) and depth (rows), one map per series, the share written in each cell."""
    names = list(cells)
    columns = min(3 if len(names) <= 6 else 4, len(names))
    rows = -(-len(names) // columns)
    lengths = sorted({cell["length"] for own in cells.values() for cell in own})
    depths = list(dict.fromkeys(cell["depth"] for own in cells.values() for cell in own))
    width = max(3.0, 0.62 * len(lengths) + 1.3)
    height = max(1.7, 0.36 * len(depths) + 1.15)
    figure = new_figure(width * columns + 0.5, height * rows + 0.45)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    grid = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(names):
            axes.axis("off")
            continue
        _heat_map(axes, names[index] if len(names) > 1 else "", cells[names[index]], lengths, depths)
    return figure


def _heat_map(axes: Any, name: str, cells: Sequence[Mapping[str, Any]], lengths: list[int], depths: list[Any]) -> None:
    values = {(cell["depth"], cell["length"]): cell["num_correct"] / cell["num_trials"] for cell in cells}
    matrix = [[values.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    axes.pcolormesh(matrix, cmap="YlGnBu", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    for r, row in enumerate(matrix):
        for c, value in enumerate(row):
            axes.text(
                c + 0.5,
                r + 0.5,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.55 else INK,
            )
    axes.set_title(name, loc="left", fontsize=9.5, color=INK)
    axes.set_xticks([c + 0.5 for c in range(len(lengths))], [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_yticks(
        [r + 0.5 for r in range(len(depths))],
        ["random" if d is None else f"{100 * d:.0f}%" for d in depths],
        fontsize=8,
    )
    axes.set_xlabel("tokens", fontsize=8.5, color=INK)
    axes.set_ylabel("needle depth", fontsize=8.5, color=INK)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def rope_dimensions(rows: Sequence[Any], *, trained: int, target: int, title: str, has_method: bool) -> Figure:
    """Turns in the trained window per dimension, and below it what the method does to each wavelength.

    Args:
        rows: `rope.analysis.DimensionRow`s.
    """
    figure = new_figure(7.4, 5.4 if has_method else 3.6)
    panels = figure.subplots(2 if has_method else 1, 1, squeeze=False, sharex=True)[:, 0]
    index = [row.index for row in rows]
    top = panels[0]
    top.bar(
        index,
        [row.turns for row in rows],
        color=["#0072b2" if row.completes_a_turn else "#d55e00" for row in rows],
        width=0.8,
    )
    top.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    style(top, title, "" if has_method else "dimension pair", f"turns in {trained:,} tokens")
    top.set_yscale("log")
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    never = sum(not row.completes_a_turn for row in rows)
    top.annotate(
        f"{never} of {len(rows)} pairs never complete a turn",
        (0.99, 0.93),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=8.5,
        color="#d55e00",
    )
    if has_method:
        bottom = panels[1]
        bottom.plot(index, [row.stretch for row in rows], color="#009e73", linewidth=2, marker="o", markersize=3)
        bottom.axhline(target / trained, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        bottom.axhline(1, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        style(bottom, "", "dimension pair (fast to slow)", f"wavelength stretch for {target:,}")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png")


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element for inlining in HTML; `name` keeps its ids apart from other figures'."""
    with matplotlib.rc_context({"svg.hashsalt": f"longext-{name}"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
