"""Tables, notes and the picture of `eval short` and `eval effective`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longext.report.tables import Table, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.evals.effective import TriedLength
    from longext.evals.short_context import ShortResult

_NEAR = 1.3  # ticks closer than this factor would overlap
_ROOM = 1.15  # beside the outermost points


def short_table(name: str, base: str, results: Sequence[ShortResult]) -> Table:
    """Perplexity of model and base at each length, the change and its interval."""
    rows = [
        [
            f"{row.length:,}",
            number(row.base_ppl),
            number(row.ppl),
            f"{row.change:+.2%}",
            _change_interval(row),
            "pass" if row.passed else "FAIL",
            f"{row.num_windows:,}",
            f"{row.num_tokens:,}",
        ]
        for row in results
    ]
    first = results[0]
    resampled = f"interval: paired bootstrap over {first.resampled}" if first.resampled else "no interval"
    return Table(
        f"Short texts: {name} against {base}",
        ["length", "base ppl", "ppl", "change", "95% interval", "", "windows", "tokens scored"],
        rows,
        left=frozenset({5}),
        caption=f"{first.num_documents} document(s); {resampled}",
    )


def _change_interval(row: ShortResult) -> str:
    if row.change_low is None or row.change_high is None:
        return "-"
    return f"{row.change_low:+.2%} to {row.change_high:+.2%}"


def short_notes(record: Mapping[str, Any]) -> list[str]:
    """Return the verdict, and where it could turn with other documents or on fewer of them."""
    notes = [record["verdict"]]
    if record["undecided"]:
        lengths = ", ".join(f"{length:,}" for length in record["undecided"])
        notes.append(f"The interval holds the tolerance at {lengths} tokens: more documents would make it surer.")
    if record["data"]["num_too_short"]:
        notes.append(f"{record['data']['num_too_short']} document(s) shorter than the largest window were left out.")
    return notes


def effective_table(name: str, test: str, bar: float, tried: Sequence[TriedLength]) -> Table:
    """Every length tried, shortest first."""
    found = max((row.length for row in tried if row.passed), default=None)
    rows = [
        [
            f"{row.length:,}",
            percent(row.accuracy),
            f"{percent(row.low)} - {percent(row.high)}",
            "pass" if row.passed else "fail",
            "yes" if row.clearly else "no",
            f"{row.num_correct}/{row.num_trials}",
            str(row.order),
        ]
        for row in tried
    ]
    best = frozenset((r, 0) for r, row in enumerate(tried) if row.length == found)
    return Table(
        f"Effective length of {name}: {test} at {percent(bar)} or more",
        ["length", "accuracy", "95% interval", f">= {percent(bar)}", "interval above", "right", "tried as"],
        rows,
        best,
        left=frozenset({3, 4}),
    )


def effective_figure(tried: Sequence[TriedLength], *, bar: float, trained: int, title: str) -> Figure:
    """Accuracy with its interval at each length tried; filled where it passed, the bar dashed."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from longext.report.plots import INK, METHOD_COLOURS, new_figure, style

    figure = new_figure(7.4, 4.2)
    axes = figure.subplots()
    lengths = [row.length for row in tried]
    axes.plot(lengths, [100 * row.accuracy for row in tried], color="#b8b8b8", linewidth=1.2, zorder=1)
    for passed, colour, label in (
        (True, METHOD_COLOURS["yarn"], "passed"),
        (False, METHOD_COLOURS["llama3"], "failed"),
    ):
        own = [row for row in tried if row.passed == passed]
        axes.errorbar(
            [row.length for row in own],
            [100 * row.accuracy for row in own],
            [
                [100 * max(0.0, row.accuracy - row.low) for row in own],
                [100 * max(0.0, row.high - row.accuracy) for row in own],
            ],
            fmt="o",
            color=colour,
            markerfacecolor=colour if passed else "white",
            markersize=5.5,
            elinewidth=1.2,
            capsize=3,
            clip_on=False,
            zorder=3,
            label=label if own else None,
        )
    axes.axhline(100 * bar, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"bar, {percent(bar)}")
    style(axes, title, "tokens (log scale)", "accuracy, %")
    axes.set_xscale("log", base=2)
    low, high = lengths[0] / _ROOM, lengths[-1] * _ROOM
    axes.set_xlim(low, high)
    if low <= trained <= high:
        label = f"trained length {trained:,}"
        axes.axvline(trained, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=label, zorder=1)
    axes.xaxis.set_major_locator(FixedLocator(_apart(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(-2, 104)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _apart(lengths: Sequence[int]) -> list[int]:
    """Return the lengths whose labels leave room for each other, the shortest of a crowd."""
    shown: list[int] = []
    for length in lengths:
        if not shown or length >= _NEAR * shown[-1]:
            shown.append(length)
    return shown
