"""Table and picture of `eval reconstruction`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longext.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.evals.memory.reconstruction import Estimate, Reconstruction

_SHARES = {  # metric -> (name, colour); Okabe and Ito
    "bleu": ("BLEU-4", "#0072b2"),
    "rouge_l": ("ROUGE-L", "#009e73"),
    "exact_prefix": ("exact prefix", "#e69f00"),
    "accuracy": ("token accuracy, teacher-forced", "#cc79a7"),
}
_CONTENT_COLOURS = {"text": "#0072b2", "shuffled": "#e69f00", "random": "#7a7a7a"}


def reconstruction_tables(title: str, results: Sequence[Reconstruction]) -> list[Table]:
    """What came back by greedy decoding, and what the memory is worth teacher-forced; a row per content and ratio."""
    count = f"{results[0].num_segments} segments, 95% bootstrap intervals over them"
    decoded = Table(
        f"Reconstruction by {title}: greedy decoding",
        ["content", "ratio", "BLEU-4", "interval", "sentence", "ROUGE-L", "interval", "exact prefix", "exact match"],
        [
            [
                *_place(row),
                *_with_interval(row.metrics["bleu"]),
                f"{row.metrics['sentence_bleu'].mean:.3f} / {row.metrics['sentence_bleu'].median:.3f}",
                *_with_interval(row.metrics["rouge_l"]),
                *(f"{row.metrics[name].mean:.1%}" for name in ("exact_prefix", "exact_match")),
            ]
            for row in results
        ],
        caption=f"{count}; BLEU-4 of the corpus, then mean / median of single segments; no smoothing",
    )
    forced = Table(
        f"Reconstruction by {title}: teacher-forced",
        ["content", "ratio", "accuracy", "CE memory", "CE none", "CE base", "bits saved/token", "interval", "median"],
        [
            [
                *_place(row),
                f"{row.metrics['accuracy'].mean:.1%}",
                *(f"{row.metrics[name].mean:.3f}" for name in ("ce_memory", "ce_none", "ce_base")),
                *_with_interval(row.metrics["bits_saved"]),
                f"{row.metrics['bits_saved'].median:.3f}",
            ]
            for row in results
        ],
        caption="CE in nats per token: with the memory, the same without it (both after the repeat token), and of the "
        "base model by itself; bits saved: (none - memory) / ln 2",
    )
    return [decoded, forced]


def _place(row: Reconstruction) -> tuple[str, str]:
    return row.content, f"{row.ratio}x"


def _with_interval(value: Estimate) -> tuple[str, str]:
    between = "-" if value.low is None or value.high is None else f"{value.low:.3f} to {value.high:.3f}"
    return f"{value.mean:.3f}", between


def reconstruction_by_ratio(rows: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """One panel of shares (0 to 1) per content, and one of bits saved per token, all by ratio; intervals shaded.

    Args:
        rows: results as in the JSON record.
    """
    from longext.report.plots import INK, new_figure

    contents = list(dict.fromkeys(row["content"] for row in rows))
    figure = new_figure(3.6 * (len(contents) + 1) + 0.6, 4.1)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    *panels, last = figure.subplots(1, len(contents) + 1, squeeze=False)[0]
    for axes, content in zip(panels, contents, strict=True):
        for metric, (name, colour) in _SHARES.items():
            _line(axes, [row for row in rows if row["content"] == content], metric, name, colour)
        _finish(axes, content, "share", rows)
        axes.set_ylim(-0.03, 1.03)
    for content in contents:
        own = [row for row in rows if row["content"] == content]
        _line(last, own, "bits_saved", content, _CONTENT_COLOURS.get(content, INK))
    last.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _finish(last, "cross-entropy", "bits saved per token", rows)
    if len(contents) > 1:
        last.legend(frameon=False, fontsize=8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=len(names), frameon=False, fontsize=8.5)
    return figure


def _line(axes: Any, rows: Sequence[Mapping[str, Any]], metric: str, name: str, colour: str) -> None:
    ratios = [row["ratio"] for row in rows]
    values = [row["metrics"][metric] for row in rows]
    means = [value["mean"] for value in values]
    axes.plot(ratios, means, marker="o", markersize=4.5, linewidth=1.9, color=colour, label=name)
    if all(value["low"] is not None for value in values):
        low, high = ([value[key] for value in values] for key in ("low", "high"))
        if len(rows) == 1:
            axes.vlines(ratios, low, high, color=colour, alpha=0.5)
        else:
            axes.fill_between(ratios, low, high, color=colour, alpha=0.14, linewidth=0)


def _finish(axes: Any, title: str, label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from longext.report.plots import style

    style(axes, title, "compression ratio", label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["ratio"] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
