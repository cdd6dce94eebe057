"""Tables and picture of perplexity with a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longext.evals.statistics import Estimate
from longext.report.plots import INK, log_perplexity, new_figure, style
from longext.report.tables import Table, number
from longext.report.views import marks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.evals.memory.next_segment import MemoryPerplexity

_MEMORY = "memory"
_CONTEXT = "context before the segment (tokens)"
# One look per method: colour (Okabe and Ito) and dashes.
_LOOKS: dict[str, tuple[str, Any]] = {
    _MEMORY: ("#0072b2", "solid"),
    "no memory": ("#7a7a7a", (0, (4, 2))),
    "wrong document": ("#d55e00", "solid"),
    "constant prefix": ("#cc79a7", "solid"),
    "window (same KV)": ("#e69f00", "solid"),
    "window (all that fits)": ("#009e73", "solid"),
}


def memory_perplexity_tables(name: str, results: Sequence[MemoryPerplexity]) -> list[Table]:
    """Perplexity by method and context, what the memory gains over each control, and where in the segment."""
    rows = {(row.length, row.method): row for row in results}
    lengths = list(dict.fromkeys(row.length for row in results))
    methods = list(dict.fromkeys(row.method for row in results))
    controls = [method for method in methods if rows[lengths[0], method].difference is not None]
    tables = [_perplexities(name, rows, lengths, methods)]
    if controls:
        tables.append(_differences(name, rows, lengths, controls))
    return [*tables, _by_position(name, rows, lengths, methods)]


_Rows = Mapping[tuple[int, str], "MemoryPerplexity"]


def _perplexities(name: str, rows: _Rows, lengths: list[int], methods: list[str]) -> Table:
    first = rows[lengths[0], methods[0]]
    columns = [[_estimate(rows[length, method]) for method in methods] for length in lengths]
    best, tied = marks(columns, lower_is_better=True)
    cells = [[method, *(_perplexity(rows[length, method]) for length in lengths)] for method in methods]
    readable = [f"{rows[length, methods[0]].num_readable:,}" for length in lengths]
    note = f"95% bootstrap over {first.resampled}" if first.resampled else "no interval: nothing to resample"
    return Table(
        f"Perplexity of the next segment by context: {name}",
        ["method", *(f"{length:,}" for length in lengths)],
        [*cells, ["positions kept readable", *readable]],
        best,
        caption=f"{first.num_places} places in {len(first.per_document)} document(s), {first.num_tokens:,} tokens, the "
        f"same everywhere; {note}; the best is marked if its interval meets no other, ~ shares the lead",
        tied=tied,
    )


def _estimate(row: MemoryPerplexity) -> Estimate:
    return row.ppl, None if row.ppl_low is None or row.ppl_high is None else (row.ppl_low, row.ppl_high)


def _perplexity(row: MemoryPerplexity) -> str:
    if row.ppl_low is None or row.ppl_high is None:
        return number(row.ppl)
    return f"{number(row.ppl)} ({number(row.ppl_low)}-{number(row.ppl_high)})"


def _differences(name: str, rows: _Rows, lengths: list[int], controls: list[str]) -> Table:
    shown = [length for length in lengths if length] or lengths  # without context there is nothing to tell apart
    return Table(
        f"NLL of the memory minus that of each control, nats per token: {name}",
        ["control", *(f"{length:,}" for length in shown)],
        [[control, *(_signed(rows[length, control]) for length in shown)] for control in controls],
        caption="paired on the same tokens, 95% bootstrap intervals; below 0 the memory is better",
    )


def _signed(row: MemoryPerplexity) -> str:
    if row.difference is None:
        return "-"
    if row.difference_low is None:
        return f"{row.difference:+.3f}"
    return f"{row.difference:+.3f} ({row.difference_low:+.3f} {row.difference_high:+.3f})"


def _by_position(name: str, rows: _Rows, lengths: list[int], methods: list[str]) -> Table:
    def cell(row: MemoryPerplexity) -> str:
        return f"{row.nll_first_quarter:.3f} / {row.nll_last_quarter:.3f}"

    return Table(
        f"NLL in the first / last quarter of the segment: {name}",
        ["method", *(f"{length:,}" for length in lengths)],
        [[method, *(cell(rows[length, method]) for length in lengths)] for method in methods],
        caption="nats per token; a memory helps most where the segment itself gives no context yet",
    )


def memory_perplexity_figure(results: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Perplexity by context length, a line per method, and below it what the memory gains, paired 95 % bands shaded.

    The intervals of the perplexities themselves are in the table: they hold the spread between texts, which is the same
    for all methods and would hide what tells them apart. The memory's own is drawn.

    Args:
        results: `MemoryPerplexity` rows as dicts.
    """
    controls = [row for row in results if row["difference"] is not None]
    figure = new_figure(8.2, 6.4 if controls else 4.2)
    panels = figure.subplots(
        2 if controls else 1, 1, squeeze=False, sharex=True, height_ratios=[3, 2] if controls else [1]
    )[:, 0]
    _draw(panels[0], results, "ppl", "ppl_low", "ppl_high", shaded=(_MEMORY,))
    style(panels[0], title, "" if controls else _CONTEXT, "perplexity (log scale)")
    log_perplexity(panels[0])
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].legend(
        handles[::-1], labels[::-1], frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    if controls:
        panels[1].axhline(0, color=INK, linewidth=1)
        _draw(panels[1], controls, "difference", "difference_low", "difference_high", shaded=tuple(_LOOKS))
        style(panels[1], "", _CONTEXT, "memory - control (nats)")
    lengths = sorted({row["length"] for row in results})
    panels[-1].set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    return figure


def _draw(
    axes: Any, rows: Sequence[Mapping[str, Any]], middle: str, low: str, high: str, *, shaded: Sequence[str]
) -> None:
    """Draw a line per method against context length, lengths evenly spaced, the memory on top; bands for `shaded`."""
    lengths = sorted({row["length"] for row in rows})
    for method in reversed(list(dict.fromkeys(row["method"] for row in rows))):
        colour, dashes = _LOOKS[method]
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["length"])
        x = [lengths.index(row["length"]) for row in own]
        width, size, shade = (2.4, 5.5, 0.16) if method == _MEMORY else (1.6, 4, 0.1)
        axes.plot(
            x,
            [row[middle] for row in own],
            marker="o",
            markersize=size,
            linewidth=width,
            color=colour,
            linestyle=dashes,
            label=method,
        )
        if method in shaded and all(row[low] is not None for row in own):
            axes.fill_between(
                x, [row[low] for row in own], [row[high] for row in own], color=colour, alpha=shade, linewidth=0
            )
