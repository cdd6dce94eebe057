"""Lines of a text file, each with what an error calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longext.errors import DataError


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:number", line) of every line that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        content = path.read_bytes()
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
