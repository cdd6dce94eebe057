"""Table and picture of `eval efficiency`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longext.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.evals.memory.efficiency import EfficiencyPoint

_COLOURS = {"full": "#7a7a7a", "window": "#e69f00"}
_RATIO_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#5b3e96")


def way_name(way: str, ratio: int | None) -> str:
    """Return "full", "window" or "uio 8x"."""
    return way if ratio is None else f"{way} {ratio}x"


def efficiency_table(name: str, record: Mapping[str, Any], points: Sequence[EfficiencyPoint]) -> Table:
    """One row per length and way; in brackets the time of full attention over this one's."""
    full = {point.length: point for point in points if point.way == "full"}
    rows = [
        [
            f"{point.length:,}",
            way_name(point.way, point.ratio),
            f"{_seconds(point.prefill_seconds)} ({full[point.length].prefill_seconds / point.prefill_seconds:.2f}x)",
            f"{point.prefill_tokens_per_second:,.0f}",
            f"{point.prefill_microseconds:,.1f}",
            f"{point.decode_tokens_per_second:,.1f}",
            size(point.kv_bytes),
            f"{point.kv_bytes_per_token:,.0f}",
            f"{point.marginal_bytes_formula:,.0f}",
            size(point.peak_bytes),
        ]
        for point in points
    ]
    model, protocol = record["model"], record["protocol"]
    threads = f", {model['num_threads']} thread(s)" if model["num_threads"] else ""
    return Table(
        f"Efficiency of {name}: {model['device']}{threads}, {model['dtype']}, {model['attention']}",
        [
            "length",
            "context",
            "prefill (full / this)",
            "tokens/s",
            "us/token",
            "decode tok/s",
            "KV",
            "KV B/token",
            "formula",
            "peak memory",
        ],
        rows,
        left=frozenset({1}),
        caption=f"best of {protocol['num_repeats']} interleaved runs, batch 1, random tokens; KV: held after the "
        f"prefill, raw rest and sink included; formula: bytes of one more token, {protocol['bytes_per_position']:,} "
        f"(2 x layers x KV heads x head size x bytes) / ratio; peak: {protocol['memory']}",
    )


def size(count: float) -> str:
    """Return bytes in a unit that leaves few digits (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def efficiency_by_length(rows: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Prefill seconds and KV bytes by length, a line per way; both axes logarithmic.

    Args:
        rows: results as in the JSON record.
    """
    from longext.report.plots import INK, new_figure

    names = list(dict.fromkeys((row["way"], row["ratio"]) for row in rows))
    spare = iter(_RATIO_COLOURS * len(names))
    colours = {name: _COLOURS.get(name[0]) or next(spare) for name in names}
    figure = new_figure(9.4, 4.0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    for axes, (key, label) in zip(
        figure.subplots(1, 2), (("prefill_seconds", "prefill (seconds)"), ("kv_bytes", "KV bytes held")), strict=True
    ):
        for way, ratio in names:
            own = [row for row in rows if (row["way"], row["ratio"]) == (way, ratio)]
            axes.plot(
                [row["length"] for row in own],
                [row[key] for row in own],
                marker="o",
                markersize=4.5,
                linewidth=1.9,
                color=colours[way, ratio],
                label=way_name(way, ratio),
            )
        _finish(axes, label, key == "kv_bytes", sorted({row["length"] for row in rows}))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=8.5)
    return figure


def _finish(axes: Any, label: str, is_bytes: bool, lengths: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from longext.report.plots import style

    style(axes, label, "context length (tokens)", "")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if is_bytes else f"{value:g}"))
