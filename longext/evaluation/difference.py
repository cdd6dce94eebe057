"""Two results of one kind beside each other: every score in both, and what else differs between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longext.errors import DataError
from longext.evaluation.protocol import RESULT_SCHEMA

_FAMILY = RESULT_SCHEMA.partition("/")[0] + "/"
_HEADER = ("schema", "kind", "command", "versions", "model", "protocol", "data")
_COMPARED = ("model", "protocol", "data", "versions")
_ROW_NAMES = ("name", "task", "method", "way", "content", "memory", "ratio", "start", "length", "depth")
_NO_SCORES = frozenset({"seconds", "low", "high", "order", "trained_length", "short_length", "factor"})
_INTERVALS = ("_low", "_high")
_NO_SCORES_INSIDE = frozenset({"per_document", "rope_parameters", "examples", "notes", "base"})
_COUNT = "num_"
_TOKENIZER = "model.tokenizer_sha256"
_SOURCE = "data.source"  # where the data lay; their hash says what they are


@dataclass(frozen=True)
class ScorePair:
    """One score of both results; `change` is relative to A, None where A is 0."""

    score: str
    a: float
    b: float
    difference: float
    change: float | None


@dataclass(frozen=True)
class FieldPair:
    """One field of model, protocol, data or versions that differs; None where a result has no such field."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What `compare_results` found.

    Attributes:
        scores: those in both, in the order of A.
        only_a, only_b: names of the scores that one result has.
        fields: what differs in model, protocol, data and versions.
        comparable: kind, protocol id and data hash agree.
        reasons: why not; empty where comparable.
        cautions: what else may make the scores differ although both are comparable by that rule.
    """

    kind: str
    scores: list[ScorePair]
    only_a: list[str]
    only_b: list[str]
    fields: list[FieldPair]
    comparable: bool
    reasons: list[str]
    cautions: list[str]

    def to_json(self, a: str, b: str) -> dict[str, Any]:
        """Return the JSON of `longext eval diff`; `a` and `b` are what the user called the results."""
        return {
            "kind": "diff",
            "of": self.kind,
            "a": a,
            "b": b,
            **{k: v for k, v in asdict(self).items() if k != "kind"},
        }


def read_result(name: str) -> dict[str, Any]:
    """Return the record in a result directory or a result.json.

    Raises:
        DataError: there is none, or it is no result of longext.
    """
    path = Path(name).expanduser()
    file = path / "result.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = "the directory holds no result.json" if path.is_dir() else "there is no such file or directory"
        raise DataError(f"No result at '{name}': {known}. Give the -o directory of an evaluation.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} is not JSON, so no result of longext: {error}") from error
    if not isinstance(record, dict) or not str(record.get("schema")).startswith(_FAMILY):
        raise DataError(f"{file} is no result of longext: its `schema` is not {RESULT_SCHEMA}.")
    missing = [key for key in ("kind", "model", "protocol", "data") if key not in record]
    if missing:
        raise DataError(f"{file} is no complete result of longext: it has no `{missing[0]}`.")
    return record


def compare_results(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """Return every score in both records and every field that differs.

    Raises:
        DataError: they are results of different kinds.
    """
    if a["kind"] != b["kind"]:
        raise DataError(f"A is a result of kind '{a['kind']}', B of kind '{b['kind']}': give two of one kind.")
    own, other = scores_of(a), scores_of(b)
    fields = _differing_fields(a, b)
    reasons = [
        f"the {what} differs" if left is not None and right is not None else f"the {what} is missing in one"
        for what, left, right in (
            ("protocol id", _protocol_ids(a), _protocol_ids(b)),
            ("data hash", _data_hash(a), _data_hash(b)),
        )
        if left != right
    ]
    return Difference(
        kind=a["kind"],
        scores=[_pair(name, value, other[name]) for name, value in own.items() if name in other],
        only_a=[name for name in own if name not in other],
        only_b=[name for name in other if name not in own],
        fields=fields,
        comparable=not reasons,
        reasons=reasons,
        cautions=_cautions(fields, a, b),
    )


def scores_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return every score of a record by a name that says its row; counts, times and intervals are none."""
    return {name: value for name, key, value in _numbers(_body(record), "") if not key.startswith(_COUNT)}


def _body(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _HEADER}


def _numbers(value: Any, name: str, key: str = "") -> Iterator[tuple[str, str, float]]:
    """Yield (name, last key, value) of the numbers in a record's body."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            if inner not in _NO_SCORES_INSIDE and inner not in _NO_SCORES and inner not in _ROW_NAMES:
                yield from _numbers(item, f"{name}.{inner}" if name else inner, inner)
    elif isinstance(value, (list, tuple)):
        for row_name, item in _named_rows(value):
            yield from _numbers(item, f"{name}[{row_name}]", key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and _may_be_score(key):
        yield name, key, value


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


def _pair(name: str, a: float, b: float) -> ScorePair:
    return ScorePair(name, a, b, b - a, (b - a) / abs(a) if a else None)


# --- what else differs ------------------------------------------------------------------------------------------------


def _differing_fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[FieldPair]:
    left, right = (dict(_leaves({key: record.get(key) for key in _COMPARED})) for record in (a, b))
    return [
        FieldPair(name, left.get(name), right.get(name))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    ]


def _leaves(value: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        own = f"{name}.{key}" if name else key
        if isinstance(item, Mapping):
            yield from _leaves(item, own)
        else:
            yield own, item


def _protocol_ids(record: Mapping[str, Any]) -> Any:
    """Return the protocol id; those of the parts where a protocol has several."""
    return {name: value for name, value in _leaves(record["protocol"] or {}) if name.split(".")[-1] == "id"} or None


def _data_hash(record: Mapping[str, Any]) -> Any:
    return (record["data"] or {}).get("sha256")


def _cautions(fields: list[FieldPair], a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    names = [own.field for own in fields]
    settings = [name for name in names if name.startswith(("protocol.", "data.")) and name != _SOURCE]
    cautions = [f"settings differ: {', '.join(settings)}"] if settings else []
    if _TOKENIZER in names:
        cautions.append("the tokenizers differ: lengths and values per token are of different tokens")
    left, right = (
        {name: value for name, key, value in _numbers(_body(own), "") if key.startswith(_COUNT)} for own in (a, b)
    )
    counts = dict.fromkeys(name.split(".")[-1] for name in left if name in right and left[name] != right[name])
    return [*cautions, *([f"counts differ: {', '.join(counts)}"] if counts else [])]
