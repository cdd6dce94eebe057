"""Pictures as matplotlib figures, each saved as PNG beside its JSON; the same figures go into HTML as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from longext.attention.bands import REMAPS
from longext.rope.spec import ROPE_METHODS

matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a model is a $

# One colour per method, the same in every picture; readable for the colour-blind (Okabe and Ito, extended).
METHOD_COLOURS = {name: kind[name].colour for kind in (ROPE_METHODS, REMAPS) for name in kind if kind[name].colour}
INK, GRID = "#222222", "#e3e3e3"
TRAINED_DASHES = (0, (4, 3))  # of the line at the trained length, in every picture


class NotebookFigure(Figure):
    """A figure that a notebook shows as it is; one made without pyplot is a line of text there."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this project's look, sizes in inches; no backend is chosen for it."""
    return NotebookFigure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def style(axes: Any, title: str, x: str, y: str) -> None:
    """Give axes a title, labels and this project's look."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=INK, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def perplexity_text(value: float) -> str:
    """Return a perplexity as axes write it."""
    return f"{value:,.0f}" if value >= 20 else f"{value:g}"


def log_ticks(axes: Any, spell: Callable[[float], str] = perplexity_text) -> None:
    """Give the y axis a log scale with round ticks; never narrower than a factor of two: small changes look small."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if not 0 < low < high:  # nothing that can be drawn, as of a model whose logits are NaN
        low, high = 1.0, 10.0
        axes.set_ylim(low, high)
    if high / low < 2:
        low, high = (math.sqrt(low * high) * side for side in (2**-0.5, 2**0.5))
        axes.set_ylim(low, high)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    nice = [m * 10**e for e in exponents for m in ((1, 1.5, 2, 3, 5, 7) if high / low < 100 else (1, 3))]
    ticks = [tick for tick in nice if low <= tick <= high]
    if len(ticks) < 4:
        ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spell(value)))


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
        drawn = [float("nan") if row.is_stopped else row.stretch for row in rows]
        bottom.plot(index, drawn, color="#009e73", linewidth=2, marker="o", markersize=3)
        stopped = [row.index for row in rows if row.is_stopped]
        for at in stopped:
            bottom.axvspan(at - 0.5, at + 0.5, color=INK, alpha=0.12, linewidth=0)
        bottom.set_xlim(top.get_xlim())
        bottom.axhline(target / trained, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        bottom.axhline(1, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        style(bottom, "", "dimension pair (fast to slow)", f"wavelength stretch for {target:,}")
        if max(row.stretch for row in rows if not row.is_stopped or len(stopped) == len(rows)) > 4 * target / trained:
            bottom.set_yscale("log")
            bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if stopped:
            note = f"{len(stopped)} of {len(rows)} pairs stopped (grey)"
            bottom.annotate(note, (0.01, 0.93), xycoords="axes fraction", va="top", fontsize=8.5, color=INK)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png")
