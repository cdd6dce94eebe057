"""Two results beside each other as tables and one line of verdict."""

from __future__ import annotations

import json
import re
from typing import Any

from longext.report.difference import Difference
from longext.report.tables import Table

_WIDTH = 48
_SHA256 = re.compile(r"[0-9a-f]{64}")


def difference_tables(found: Difference, a: str, b: str) -> list[Table]:
    """Return the scores in both, then the fields that differ."""
    scores = [
        [
            pair.score,
            f"{pair.a:.5g}",
            f"{pair.b:.5g}",
            f"{pair.difference:+.4g}" if pair.difference else "0",
            "-" if pair.change is None else f"{pair.change:+.2%}",
        ]
        for pair in found.scores
    ]
    only = [f"{len(names)} only in {side}" for side, names in (("A", found.only_a), ("B", found.only_b)) if names]
    tables = [
        Table(
            f"{found.kind}: A = {a}, B = {b}",
            ["score", "A", "B", "B - A", "relative"],
            scores,
            caption="; ".join([f"{len(scores)} score(s) in both", *only]),
        )
    ]
    if found.fields:
        fields = [[own.field, _shown(own.a), _shown(own.b)] for own in found.fields]
        tables.append(Table("What differs between them", ["field", "A", "B"], fields, left=frozenset({1, 2})))
    return tables


def difference_notes(found: Difference) -> list[str]:
    """Return the verdict, and what it leaves open."""
    if not found.comparable:
        return [f"Not comparable: {'; '.join(found.reasons)}."]
    tail = f" But {'; '.join(found.cautions)}." if found.cautions else ""
    return [f"Comparable: kind, protocol id and data hash agree.{tail}"]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if _SHA256.fullmatch(text):
        return text[:12]
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
