"""Serving engines as tables: which of them reads which exported RoPE, what the others make of it, their commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longext.conversion.engines import ENGINES, KINDS, OTHER, REFUSED, RIGHT, RUN, Reading, kind_of
from longext.report.tables import Table
from longext.rope.spec import ROPE_METHODS, RopeSpec, extension_methods, rope_parameters

_WORDS = {RIGHT: "yes", OTHER: "no", REFUSED: "refused"}


def engine_tables() -> list[Table]:
    """Return the tables of docs/engines.md: kinds by engines, what is read otherwise, versions and commands."""
    kinds = [
        [", ".join(names) or "-", KINDS[kind], *(_verdict(engine.reading(kind)) for engine in ENGINES)]
        for kind, names in methods_by_kind().items()
    ]
    others = [
        [engine.title, KINDS[kind], reading.what, reading.evidence, reading.source or "-"]
        for engine in ENGINES
        for kind, reading in engine.readings.items()
        if reading.verdict != RIGHT or reading.source
    ]
    commands = [[each.title, f"`{each.serve}`", _code(each.override), each.source] for each in ENGINES]
    return [
        Table(
            "What is read as transformers 5 reads it",
            ["methods", "written as", *(engine.title for engine in ENGINES)],
            kinds,
            left=frozenset(range(2 + len(ENGINES))),
            caption="yes*, no*: run; the others were read in the engine's code. no: in silence another RoPE.",
        ),
        Table(
            "What engines do otherwise",
            ["engine", "written as", "what it does", "known by", "source"],
            [[*row[:2], row[2] or "reads it rightly", *row[3:]] for row in others],
            left=frozenset(range(5)),
        ),
        Table(
            "Commands",
            ["engine", "a checkpoint DIR at N tokens", "flags for the model as it is", "looked at"],
            commands,
            left=frozenset(range(4)),
        ),
    ]


def gguf_engine_table(record: Mapping[str, Any]) -> Table:
    """Return the table of `benchmarks/gguf_engines.py`: llama.cpp beside transformers, one setting of a model a row."""
    rows = []
    for model, setting in dict.fromkeys((row["model"], row["setting"]) for row in record["results"]):
        own = [row for row in record["results"] if (row["model"], row["setting"]) == (model, setting)]
        row = [model, f"`{setting.partition(',')[0]}`{''.join(setting.partition(',')[1:])}"]
        if any("refused" in each for each in own):
            rows.append([*row, *["refused"] * 6])
            continue
        for each in sorted(own, key=lambda found: found["factor"]):
            row += [f"{each['ppl_transformers']:.3f}", f"{each['ppl_llama_cpp']:.3f}"]
        worst = max(each["largest_difference"] for each in own)
        same = min(each["same_tokens"] for each in own)
        rows.append([*row, f"{worst:.1e}", f"{same} of {record['new_tokens']}"])
    at = [f"{engine} at {factor}x" for factor in (2, 8) for engine in ("transformers", "llama.cpp")]
    columns = ["model", "method", *at, "largest difference", "same greedy tokens"]
    return Table("Perplexity in llama.cpp beside transformers", columns, rows, left=frozenset({0, 1}))


def methods_by_kind() -> dict[str, list[str]]:
    """Return the methods that are written as each kind, with the parameters that make them so."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in extension_methods():
        kinds: list[str] = []
        for example in ROPE_METHODS[name].examples:
            values = {key: value(64) if callable(value) else value for key, value in example.items()}
            kind = kind_of(rope_parameters(_spec(name, values)))
            if kind not in kinds:
                found.setdefault(kind, []).append(f"`{name}`" if not kinds else f"`{name}` ({_settings(example)})")
                kinds.append(kind)
    return found


def _spec(method: str, values: dict[str, Any]) -> RopeSpec:
    """Return a spec of a usual size: only the kind of what it is written as is read."""
    given: dict[str, Any] = {
        "rope_theta": 1e4,
        "rotary_dim": 64,
        "original_max_position_embeddings": 512,
        "factor": 8.0,
    }
    return RopeSpec(method=method, **{**given, **values})


def _settings(example: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in example.items() if not callable(value))


def _verdict(reading: Reading) -> str:
    word = _WORDS.get(reading.verdict, "?")
    return f"{word}*" if reading.evidence == RUN and reading.verdict in (RIGHT, OTHER) else word


def _code(text: str) -> str:
    return f"`{text}`" if text else "-"
