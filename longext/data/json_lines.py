"""What the rows of several suites have in common: texts under names, and notes on rows that repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from longext.errors import ConfigError, DataError
from longext.untrusted import json_lines

RowT = TypeVar("RowT")


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


def rows_of(
    path: Path,
    read: Callable[[str, Any], RowT],
    form: str,
    advice: str = "",
    *,
    option: str = "--data",
    kind: str = "row",
) -> list[RowT]:
    """Return what `read` makes of the place and value of each JSON line of a file.

    Args:
        form: what `option` has to be, for messages; `advice` says where that is found.
        kind: what a line holds.

    Raises:
        ConfigError, DataError: no such file, or nothing in it; what `read` raises.
    """
    if not path.is_file():
        raise ConfigError(f"{option} must be {form}, got '{path}'. {advice}".rstrip())
    rows = [read(where, value) for where, value in json_lines(path)]
    if not rows:
        raise DataError(f"{path} holds no {kind}.")
    return rows


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
