"""Tables and notes of `eval short`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longext.evaluation.short_context import ShortResult
from longext.reporting.tables import Table, number


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
