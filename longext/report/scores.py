"""The numbers in a result record, each with the rows that hold it: what `eval diff` and `report` are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longext.errors import DataError
from longext.evals.views import Score
from longext.manifest import RESULT_SCHEMA
from longext.untrusted import fields, is_a, read_json

_FAMILY = RESULT_SCHEMA.partition("/")[0] + "/"
_HEADER = ("schema", "kind", "command", "versions", "model", "protocol", "data", "cost")
_PARTS = ("model", "protocol", "data", "versions")
_ADVICE = "Give the -o directory of an evaluation."
_ROW_NAMES = ("name", "task", "method", "way", "content", "memory", "ratio", "start", "length", "depth")
_NO_SCORES = frozenset({"seconds", "low", "high", "order", "trained_length", "short_length", "factor", "usd"})
_INTERVALS = ("_low", "_high")
_NO_SCORES_INSIDE = frozenset(
    {
        "per_document",
        "intervals",
        "bucket_intervals",
        "average_intervals",
        "rope_parameters",
        "examples",
        "notes",
        "base",
        "bars",
    }
)


# --- records ----------------------------------------------------------------------------------------------------------


def result_file(name: str) -> Path:
    """Return the result.json of a result directory, or the file itself.

    Raises:
        DataError: there is none.
    """
    path = Path(name).expanduser()
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        known = "the directory holds no result.json" if path.is_dir() else "there is no such file or directory"
        raise DataError(f"No result at '{name}': {known}. Give the -o directory of an evaluation.")
    return file


def read_record(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds: a record of longext, or of another program.

    Raises:
        DataError: it is not JSON, with the line; or a record of longext with parts of another type.
    """
    record = read_json(file, constant=float, advice=_ADVICE)
    if not isinstance(record, dict):
        return {}
    if str(record.get("schema")).startswith(_FAMILY):
        fields(record, str(file), {**dict.fromkeys(_PARTS, (dict, None)), "kind": (str, None)}, advice=_ADVICE)
    result: dict[str, Any] = record
    return result


def schema_trouble(record: Mapping[str, Any]) -> str | None:
    """Return why a record is none of longext, as the end of a sentence; None where it is one."""
    is_ours = str(record.get("schema")).startswith(_FAMILY)
    return None if is_ours else f"is no result of longext: its `schema` is not {RESULT_SCHEMA}."


def read_result(name: str) -> dict[str, Any]:
    """Return the record of an evaluation, from a result directory or a result.json.

    Raises:
        DataError: there is none, or it is no result of longext.
    """
    file = result_file(name)
    record = read_record(file)
    trouble = schema_trouble(record)
    if trouble is not None:
        raise DataError(f"{file} {trouble}")
    missing = [key for key in ("kind", "model", "protocol", "data") if key not in record]
    if missing:
        raise DataError(f"{file} is no complete result of longext: it has no `{missing[0]}`.")
    return record


# --- numbers ----------------------------------------------------------------------------------------------------------


def scores_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return every score of a record by a name that says its row; counts, times and intervals are none."""
    return {score.name: score.value for score in numbers_of(record) if not score.is_count}


def numbers_of(record: Mapping[str, Any]) -> Iterator[Score]:
    """Yield every score and every count of a record."""
    body = {key: value for key, value in record.items() if key not in _HEADER}
    if isinstance(body.get("average_intervals"), Mapping):
        body["averages"] = with_intervals(body["averages"], body["average_intervals"])
    yield from _numbers(body, "", (), (), {})


def with_intervals(means: Mapping[str, Any], intervals: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested means with the intervals of each under a key `intervals`."""
    if not any(isinstance(value, Mapping) for value in means.values()):
        return {**means, "intervals": intervals}
    return {key: with_intervals(value, intervals.get(key) or {}) for key, value in means.items()}


def _numbers(
    value: Any, name: str, keys: tuple[str, ...], rows: tuple[Mapping[str, Any], ...], parent: Mapping[str, Any]
) -> Iterator[Score]:
    if isinstance(value, Mapping):
        for inner, item in value.items():
            if inner not in _NO_SCORES_INSIDE and inner not in _NO_SCORES and inner not in _ROW_NAMES:
                yield from _numbers(item, f"{name}.{inner}" if name else inner, (*keys, inner), rows, value)
    elif isinstance(value, (list, tuple)):
        for row_name, item in _named_rows(value):
            yield from _numbers(item, f"{name}[{row_name}]", keys, (*rows, item), item)
    elif is_a(value, float) and math.isfinite(value) and _may_be_score(keys[-1]):
        yield Score(name, keys, value, rows, parent)


def _may_be_score(key: str) -> bool:
    return "stderr" not in key and not key.endswith(_INTERVALS)


def _named_rows(rows: Any) -> Iterator[tuple[str, Any]]:
    """Yield the mappings of a list with a name each: the fields that tell them apart, else their number."""
    named = [(_row_name(row), row) for row in rows if isinstance(row, Mapping)]
    names = [name for name, _ in named]
    for index, (name, row) in enumerate(named):
        yield (name if name and names.count(name) == 1 else f"{name} #{index}".strip()), row


def _row_name(row: Mapping[str, Any]) -> str:
    shown = {key: row[key] for key in _ROW_NAMES if isinstance(row.get(key), (str, int, float))}
    if shown.get("start") == 0:  # perplexity rows that are no range of positions
        del shown["start"]
    return " ".join(str(value) if isinstance(value, str) else f"{key}={value}" for key, value in shown.items())


# --- fields -----------------------------------------------------------------------------------------------------------


def leaves(value: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of everything in nested mappings that is no mapping."""
    for key, item in value.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(item, Mapping):
            yield from leaves(item, path)
        else:
            yield path, item
