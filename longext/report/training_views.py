"""Tables and pictures of a fine-tuning run, from its record and its metrics lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longext.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run_table(record: Mapping[str, Any], steps: int, model: str) -> Table:
    """What a run is going to do (or did): one line per choice."""
    tuning, attention, data = record["tuning"], record["attention"], record["data"]
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in tuning["by_kind"].items())
    group = f", groups of {attention['group_size']:,}" if attention["group_size"] else ""
    share = tuning["num_trainable"] / tuning["num_total"]
    tokens = record["rows_per_step"] * record["row_length"]
    rows = [
        ("length", f"{record['trained_length']:,} -> {record['target_length']:,} tokens"),
        ("attention", f"training: {attention['training']}{group}; evaluation: {attention['evaluation']}"),
        ("trained", f"{tuning['tuning']}: {tuning['num_trainable']:,} of {tuning['num_total']:,} ({share:.1%})"),
        ("", kinds),
        ("step", f"{record['rows_per_step']} rows x {record['row_length']:,} = {tokens:,} tokens; {steps:,} steps"),
        ("data", _counts(data)),
    ]
    return Table(f"Fine-tuning {model}", ("", "value"), rows, left=frozenset({1}))


def _counts(data: Mapping[str, Any]) -> str:
    """Spell the counts of a data report: what is there, and what was left out where something was."""
    told = {key: value for key, value in data.items() if key.startswith("num_") and isinstance(value, int) and value}
    if told.get("num_trained") == told.get("num_tokens"):
        told.pop("num_trained", None)
    return ", ".join(f"{value:,} {key.removeprefix('num_').replace('_', ' ')}" for key, value in told.items())


def perplexity_table(metrics: Sequence[Mapping[str, Any]]) -> Table | None:
    """Perplexity by length at each measured step, or None where nothing was measured."""
    measured = [line for line in metrics if "perplexity" in line]
    if not measured:
        return None
    lengths = list(measured[0]["perplexity"])
    rows = [(f"{line['step']:,}", *(f"{line['perplexity'][n]:.2f}" for n in lengths)) for line in measured]
    return Table("Perplexity by length, full attention", ("step", *(f"{int(n):,}" for n in lengths)), rows)


def training_curve(metrics: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Loss by step, and under it perplexity by step where it was measured, one line per length."""
    from matplotlib.ticker import MaxNLocator

    from longext.report.plots import INK, log_ticks, new_figure, style

    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    measured = [line for line in metrics if "perplexity" in line]
    plot = new_figure(7.4, 5.6 if len(measured) > 1 else 3.4)
    panels = plot.subplots(2 if len(measured) > 1 else 1, 1, squeeze=False, sharex=True)[:, 0]
    steps, values = zip(*losses, strict=True)
    panels[0].plot(steps, values, color="#9ecae1", linewidth=1)
    panels[0].plot(steps, smooth(values), color="#0072b2", linewidth=2)
    style(panels[0], title, "" if len(panels) > 1 else "step", "training loss (nats)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(measured) > 1:
        for shade, length in enumerate(measured[0]["perplexity"]):
            colour = ("#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#5b3e96")[shade % 6]
            x = [line["step"] for line in measured]
            y = [line["perplexity"][length] for line in measured]
            panels[1].plot(x, y, marker="o", markersize=3.5, color=colour, label=f"{int(length):,} tokens")
        style(panels[1], "", "step", "perplexity (full attention)")
        log_ticks(panels[1])
        panels[1].legend(frameon=False, fontsize=8.5, labelcolor=INK)
    return plot


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    smoothed, average, norm = [], 0.0, 0.0
    for value in values:
        average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(average / norm)
    return smoothed
