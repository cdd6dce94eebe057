"""Table of `eval harness`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longext.report.tables import Table


def harness_table(title: str, record: Mapping[str, Any]) -> Table:
    """One row per task, metric and filter, as lm-eval reports them."""
    rows = record["results"]
    has_filters = any(row["filter"] != "none" for row in rows)
    numbers = ("value", "95% interval", "shots", "documents", "cut")
    columns = ["task", *(["filter"] if has_filters else []), "metric", *numbers]
    cells = [
        [
            row["task"],
            *([row["filter"]] if has_filters else []),
            row["metric"] + ("" if row["higher_is_better"] else " (less is better)"),
            _score(row["value"]),
            _interval(row),
            *("-" if row[count] is None else str(row[count]) for count in ("num_fewshot", "num_documents")),
            str(row["num_truncated"]),
        ]
        for row in rows
    ]
    return Table(
        f"{title}: lm-eval {record['protocol']['lm_eval']}",
        columns,
        cells,
        left=frozenset({1, 2} if has_filters else {1}),
        caption="as lm-eval scales them; intervals are of its standard errors, Wilson's if all or none are right; cut: "
        "documents that lost the beginning of a prompt",
    )


def _interval(row: Mapping[str, Any]) -> str:
    return "-" if row["low"] is None else f"{row['low']:.4f} - {row['high']:.4f}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
