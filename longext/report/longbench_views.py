"""Tables and picture of `eval longbench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longext.report.scores import with_intervals
from longext.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {  # Okabe and Ito
    "single": "#0072b2",
    "multi": "#56b4e9",
    "summarization": "#009e73",
    "few-shot": "#e69f00",
    "code": "#cc79a7",
    "synthetic": "#7a7a7a",
}
_INTERVAL = "95% interval"
_BUCKET_SHADES = (0.45, 0.7, 1.0)


def longbench_tables(title: str, record: Mapping[str, Any]) -> list[Table]:
    """One row per task with its score (LongBench-E: by length), and the averages as the authors report them."""
    rows = record["results"]
    in_buckets = rows[0]["buckets"] is not None
    scores = list(rows[0]["buckets"]) if in_buckets else ["score"]
    was_read = any(row["num_prompt_tokens"] is not None for row in rows)
    columns = ["task", "category", "metric", *scores, *([] if in_buckets else [_INTERVAL]), "rows", "empty", "missing"]
    cells = [
        [
            row["task"],
            row["category"],
            row["metric"],
            *(map(score_text, row["buckets"].values()) if in_buckets else (score_text(row["score"]), between(row))),
            *(str(row[count]) for count in ("num_rows", "num_empty", "num_missing")),
            *((f"{row['num_truncated']}", f"{row['num_prompt_tokens']:,.0f}") if was_read else ()),
        ]
        for row in rows
    ]
    tasks = Table(
        f"{title}: {record['protocol']['id']}",
        [*columns, *(("cut", "tokens") if was_read else ())],
        cells,
        left=frozenset({1, 2}),
        caption="0 to 100; cut: prompts that lost their middle; tokens: mean length of a prompt as read"
        if was_read
        else "0 to 100",
    )
    averages = with_intervals(record["averages"], record.get("average_intervals") or {})
    return [tasks, _averages_table(averages, in_buckets)]


def lm_eval_tables(title: str, record: Mapping[str, Any]) -> list[Table]:
    """One row per task under lm-eval's protocol, and the averages of its groups; the captions say what they are not."""
    protocol = record["protocol"]
    differs = f"{protocol['id']}: not comparable with {protocol['not_comparable_with']}"
    columns = ["task", "category", "metric", "score", _INTERVAL, "rows", "empty", "cut", "tokens"]
    cells = [
        [
            *(row[key] for key in ("task", "category", "metric")),
            score_text(row["score"]),
            between(row),
            *(str(row[key]) for key in ("num_rows", "num_empty", "num_truncated")),
            f"{row['num_prompt_tokens']:,.0f}",
        ]
        for row in record["results"]
    ]
    means = record["averages"]["all"]
    return [
        Table(
            f"{title}: {differs}",
            columns,
            cells,
            left=frozenset({1, 2}),
            caption=f"100 times the scores of lm-eval {protocol['lm_eval']}, not comparable with the authors'; cut: "
            "prompts that lost their beginning; tokens: mean length of a prompt as read",
        ),
        Table(
            "Averages of lm-eval's groups, not comparable with the authors'",
            list(means),
            [[score_text(value) for value in means.values()]],
            caption="means of tasks, all languages together; '-' where one of its tasks was not scored",
        ),
    ]


def _averages_table(averages: Mapping[str, Any], in_buckets: bool) -> Table:
    named = (
        {f"{bucket} words": means["english"] for bucket, means in averages.items()} if in_buckets else dict(averages)
    )
    # code counts in both languages: by itself it says nothing of one
    told = {
        name: means
        for name, means in named.items()
        if any(value is not None for key, value in means.items() if key != "code")
    }
    named = told or {name: named[name] for name in list(named)[:1]}
    categories = [name for name in next(iter(named.values())) if name != "intervals"]
    return Table(
        "Averages as the authors report them",
        ["length" if in_buckets else "language", *categories],
        [[name, *(_mean_text(means, category) for category in categories)] for name, means in named.items()],
        caption="in brackets the 95% interval; means of tasks, and of the six categories; '-' where one of its tasks "
        "was not scored",
    )


def _mean_text(means: Mapping[str, Any], category: str) -> str:
    interval = (means.get("intervals") or {}).get(category)
    return score_text(means[category]) + (f" ({interval[0]:.1f}-{interval[1]:.1f})" if interval else "")


def between(row: Mapping[str, Any]) -> str:
    """Return the 95 % interval of a row's score, "-" where it has none."""
    return "-" if row.get("low") is None else f"{row['low']:.1f} - {row['high']:.1f}"


def score_text(value: float | None) -> str:
    """Return a score with two decimals, "-" where there is none."""
    return "-" if value is None else f"{value:.2f}"


def longbench_bars(record: Mapping[str, Any], *, title: str) -> Figure:
    """A bar per task, coloured by category; LongBench-E: three by length, the longest texts darkest."""
    from longext.report.plots import INK, new_figure, style

    rows = list(reversed(record["results"]))
    figure = new_figure(7.4, 1.3 + 0.3 * len(rows) * (1.6 if rows[0]["buckets"] else 1))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = list(row["buckets"].values()) if row["buckets"] else [row["score"]]
        height = 0.8 / len(values)
        for i, value in enumerate(values):
            y = place + 0.4 - height * (i + 0.5)
            shade = _BUCKET_SHADES[i] if len(values) > 1 else 1.0
            axes.barh(y, value or 0.0, height * 0.95, color=_COLOURS[row["category"]], alpha=shade)
            axes.annotate(
                score_text(value),
                (value or 0.0, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8 if len(values) == 1 else 6.5,
                color=INK,
            )
    style(axes, title, "score (0 to 100)", "")
    axes.set_yticks(range(len(rows)), [row["task"] for row in rows], fontsize=8.5)
    axes.set_xlim(0, 105)
    axes.grid(False, axis="y")
    used = [category for category in _COLOURS if any(row["category"] == category for row in rows)]
    handles = [axes.barh(0, 0, color=_COLOURS[category]) for category in used]
    axes.legend(handles, used, frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
