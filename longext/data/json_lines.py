"""What the rows of several suites have in common: texts under names, and notes on rows that repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

from longext.errors import DataError


def text_fields(where: str, value: Any, names: Iterable[str], what: str) -> list[str]:
    """Return the texts under `names` in one line's value.

    Raises:
        DataError: it is no object, or one of them is missing or no text.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} is no {what}: it is no JSON object.")
    for name in names:
        if not isinstance(value.get(name), str):
            raise DataError(
                f"{where} is no {what}: no text under '{name}' (found: {', '.join(sorted(value))[:200] or 'nothing'})."
            )
    return [value[name] for name in names]


def repeated_note(rows: Iterable[tuple[str, Hashable]]) -> list[str]:
    """Return a note if rows occur more than once, from (name of the file or task, what tells a row apart)."""
    earlier: set[tuple[str, Hashable]] = set()
    repeated: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, row in rows:
        counts[name] += 1
        repeated[name] += (name, row) in earlier
        earlier.add((name, row))
    listed = ", ".join(f"{number} of {counts[name]} of {name}" for name, number in repeated.items() if number)
    return [f"Rows that repeat an earlier one: {listed} (each of them counts)."] if listed else []
