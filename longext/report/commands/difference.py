"""`longext eval diff`: two results of one kind, every score in both, and what else differs between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from longext.errors import DataError
from longext.report.comparable import other_template
from longext.report.notes import value_text
from longext.report.scores import leaves, numbers_of, scores_of
from longext.report.tables import Table

_COMPARED = ("model", "protocol", "data", "versions")
_TOKENIZER = "model.tokenizer_sha256"
# What answers are like: no count of what was asked
_OF_ANSWERS = frozenset({"num_correct", "num_empty", "num_new_tokens"})
_WIDTH = 48  # characters of a value
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
        comparable: kind, protocol id and data hash agree, and so do the chat templates of models of one tokenizer.
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


def compare_results(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """Return every score in both records and every field that differs.

    Raises:
        DataError: they are results of different kinds.
    """
    if a["kind"] != b["kind"]:
        raise DataError(f"A is a result of kind '{a['kind']}', B of kind '{b['kind']}': give two of one kind.")
    left, right = scores_of(a), scores_of(b)
    fields = _differing_fields(a, b)
    reasons = [
        f"the {what} differs" if one is not None and other is not None else f"the {what} is missing in one"
        for what, one, other in (
            ("protocol id", _protocol_ids(a), _protocol_ids(b)),
            ("data hash", _data_hash(a), _data_hash(b)),
        )
        if one != other
    ]
    if other_template(_value_in(a), _value_in(b)):
        reasons.append("another template")
    return Difference(
        kind=a["kind"],
        scores=[_pair(name, value, right[name]) for name, value in left.items() if name in right],
        only_a=[name for name in left if name not in right],
        only_b=[name for name in right if name not in left],
        fields=fields,
        comparable=not reasons,
        reasons=reasons,
        cautions=_cautions(fields, a, b),
    )


def _pair(name: str, a: float, b: float) -> ScorePair:
    return ScorePair(name, a, b, b - a, (b - a) / abs(a) if a else None)


# --- what else differs ------------------------------------------------------------------------------------------------


def _differing_fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[FieldPair]:
    left, right = (dict(leaves({key: record.get(key) for key in _COMPARED})) for record in (a, b))
    return [
        FieldPair(name, left.get(name), right.get(name))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    ]


def _protocol_ids(record: Mapping[str, Any]) -> Any:
    """Return the protocol id; those of the parts where a protocol has several."""
    return {name: value for name, value in leaves(record["protocol"] or {}) if name.split(".")[-1] == "id"} or None


def _value_in(record: Mapping[str, Any]) -> Callable[[str], Any]:
    fields = dict(leaves({key: record.get(key) or {} for key in ("model", "protocol")}))
    return fields.get


def _data_hash(record: Mapping[str, Any]) -> Any:
    return (record["data"] or {}).get("sha256")


def _cautions(fields: list[FieldPair], a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    names = [pair.field for pair in fields]
    settings = [name for name in names if name.startswith(("protocol.", "data.")) and name != _SOURCE]
    cautions = [f"settings differ: {', '.join(settings)}"] if settings else []
    if _TOKENIZER in names:
        cautions.append("the tokenizers differ: lengths and values per token are of different tokens")
    left, right = (
        {
            score.name: score.value
            for score in numbers_of(record)
            if score.is_count and score.keys[-1] not in _OF_ANSWERS
        }
        for record in (a, b)
    )
    counts = dict.fromkeys(name.split(".")[-1] for name in left if name in right and left[name] != right[name])
    return [*cautions, *([f"counts differ: {', '.join(counts)}"] if counts else [])]


# --- in words and tables ----------------------------------------------------------------------------------------------


def difference_tables(difference: Difference, a: str, b: str) -> list[Table]:
    """Return the scores in both, then the fields that differ."""
    scores = [
        [
            pair.score,
            f"{pair.a:.5g}",
            f"{pair.b:.5g}",
            f"{pair.difference:+.4g}" if pair.difference else "0",
            "-" if pair.change is None else f"{pair.change:+.2%}",
        ]
        for pair in difference.scores
    ]
    sides = (("A", difference.only_a), ("B", difference.only_b))
    only = [f"{len(names)} only in {side}" for side, names in sides if names]
    tables = [
        Table(
            f"{difference.kind}: A = {a}, B = {b}",
            ["score", "A", "B", "B - A", "relative"],
            scores,
            caption="; ".join([f"{len(scores)} score(s) in both", *only]),
        )
    ]
    if difference.fields:
        fields = [[pair.field, *(_shown(value) for value in (pair.a, pair.b))] for pair in difference.fields]
        tables.append(Table("What differs between them", ["field", "A", "B"], fields, left=frozenset({1, 2})))
    return tables


def _shown(value: Any) -> str:
    return "-" if value is None else value_text(value, _WIDTH)


def difference_notes(difference: Difference) -> list[str]:
    """Return the verdict, and what it leaves open."""
    if not difference.comparable:
        return [f"Not comparable: {'; '.join(difference.reasons)}."]
    tail = f" But {'; '.join(difference.cautions)}." if difference.cautions else ""
    return [f"Comparable: kind, protocol id and, where it is recorded, data hash agree.{tail}"]
