"""Lines of a text file, each with what an error calls it."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

from longext.errors import DataError


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:number", line) of every line that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        if text.strip():
            yield where, text


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:number", value) of every line of JSON.

    Raises:
        DataError: as `numbered_lines`; or a line is not JSON.
    """
    for where, line in numbered_lines(path):
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not valid JSON: {error}.") from error


def text_fields(where: str, value: Any, names: Iterable[str], what: str) -> list[str]:
    """Return the texts under `names` in one line's value.

    Raises:
        DataError: it is no object, or one of them is missing or no text.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} is no {what}: it is no JSON object.")
    for name in names:
        if not isinstance(value.get(name), str):
            raise DataError(f"{where} is no {what}: no text under '{name}' (found: {', '.join(sorted(value))}).")
    return [value[name] for name in names]


def repeated_note(rows: Iterable[tuple[str, Hashable]]) -> list[str]:
    """Return a note where rows stand more than once, from (name of the file or task, what tells a row apart)."""
    seen: set[tuple[str, Hashable]] = set()
    repeated: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, row in rows:
        counts[name] += 1
        repeated[name] += (name, row) in seen
        seen.add((name, row))
    listed = ", ".join(f"{number} of {counts[name]} of {name}" for name, number in repeated.items() if number)
    return [f"Rows that repeat an earlier one: {listed} (each of them counts)."] if listed else []
