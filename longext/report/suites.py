"""The sections of a report, one or more for each kind of result: which numbers, in which columns, what is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longext.evals.babilong_data import length_name
from longext.evals.base import EVALS
from longext.evals.views import ALWAYS, ANY, NEVER, ONE, SEVERAL, Bars, Column, Detail, HeatMap, Lines, Score, Section
from longext.report.scores import numbers_of

_TOKENIZER = frozenset({"model.tokenizer_sha256"})  # a value per token is of that tokenizer's tokens
_TOKENS, _PROMPT, _BEFORE = "context length (tokens)", "prompt length (tokens)", "context before the segment (tokens)"
_TRIALS = Detail("trials", "num_trials")
_MEAN_TOKENS = Detail("tokens", "num_tokens", "{:,.0f}")
_SCORED = Detail("tokens scored", "num_tokens", "{:,}")


def _key_as_length(score: Score) -> int:
    return int(score.keys[-1])


def _positions(score: Score) -> str:
    return f"{score.field('start'):,}-{score.field('length'):,}"


def _folder(column: Column) -> str:
    return length_name(int(column))


def _depth(depth: float | None) -> str:
    return "random" if depth is None else f"{depth:.0%}"


def _yes(word: str, other: str) -> Callable[[bool], str]:
    return lambda value: word if value else other


def _by_task(title: str, of: str, axis: str = _PROMPT, **more: Any) -> Lines:
    return Lines(title, of=of, panel="task", axis=axis, **more)


def _pooled(title: str, **more: Any) -> Lines:
    """All tasks together; drawn task by task in another view."""
    return Lines(title, of="by_length.score", axis=_PROMPT, name="all", pooled=True, picture=NEVER, **more)


def _task_map(title: str, of: str, **more: Any) -> HeatMap:
    return HeatMap(title, of=of, rows="task", name="tasks", table=NEVER, picture=ONE, **more)


def _longest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The longest context decides from where segments are taken, at every length."""
    return {"longest context": max(row["length"] for row in record["results"])}


def _windows(record: Mapping[str, Any]) -> dict[str, Any]:
    rows = record["results"]
    return {"window": max(row["length"] for row in rows), "buckets": len(rows)}


def _depths(record: Mapping[str, Any]) -> dict[str, Any]:
    depths = {row.get("depth") for row in record["results"]} - {None}
    return {"depths": sorted(depths)} if depths else {}


_PERPLEXITY = Section(
    name="perplexity",
    title="Perplexity",
    kind="perplexity",
    picture="ppl",
    must_agree=_TOKENIZER,
    views=(
        Lines(
            "Perplexity by context length",
            of="results.ppl",
            unit="perplexity",
            lower_is_better=True,
            axis=_TOKENS,
            value="ppl",
            details=(Detail("NLL", "nll", "{:.4f}"), Detail("top-1", "accuracy", "{:.1%}"), _SCORED),
        ),
    ),
)
_POSITIONS = Section(
    name="positions",
    title="Loss by position",
    kind="perplexity",
    protocol="ppl/positional",
    picture="ppl",
    must_agree=_TOKENIZER,
    measured=_windows,
    views=(
        Lines(
            "NLL by position in the window, nats per token",
            of="results.nll",
            unit="nats",
            lower_is_better=True,
            columns=_positions,
            heading="positions",
            axis="position in the window (tokens)",
            steps=True,
            value="NLL",
            details=(Detail("ppl", "ppl", "{:.2f}"), Detail("top-1", "accuracy", "{:.1%}"), _SCORED),
        ),
    ),
)
_MEMORY = Section(
    name="memory-perplexity",
    title="Perplexity with a memory",
    kind="memory-perplexity",
    picture="ppl",
    must_agree=_TOKENIZER,
    measured=_longest,
    views=(
        Lines(
            "Perplexity of the next segment by context",
            of="results.ppl",
            unit="perplexity",
            lower_is_better=True,
            axis=_BEFORE,
            where={"method": "memory"},
            table=SEVERAL,
            picture=SEVERAL,
        ),
        Lines(
            "Perplexity of the next segment by context",
            of="results.ppl",
            name="methods",
            unit="perplexity",
            lower_is_better=True,
            variant="method",
            heading="context",
            axis=_BEFORE,
            table=ONE,
            picture=ONE,
            value="ppl",
            details=(
                Detail("first quarter", "nll_first_quarter", "{:.3f}"),
                Detail("last quarter", "nll_last_quarter", "{:.3f}"),
                Detail("positions", "num_readable", "{:,}"),
            ),
            note="quarters of the segment: NLL, nats per token; positions: before the segment, that the memory reads",
        ),
        Lines(
            "NLL of the memory minus that of its own controls, nats (below 0: the memory is better)",
            of="results.difference",
            name="controls",
            unit="signed",
            lower_is_better=None,
            panel="method",
            panel_name="control",
            axis=_BEFORE,
        ),
    ),
)
_SHORT = Section(
    name="short-context",
    title="Short texts",
    kind="short-context",
    picture="short",
    views=(
        Lines(
            "Change of perplexity against the base",
            of="results.change",
            unit="change",
            lower_is_better=True,
            axis=_TOKENS,
            value="change",
            details=(
                Detail("ppl", "ppl", "{:.2f}"),
                Detail("base ppl", "base_ppl", "{:.2f}"),
                Detail("verdict", "passed", _yes("pass", "FAIL")),
                Detail("windows", "num_windows", "{:,}"),
                _SCORED,
            ),
        ),
    ),
)
_EFFECTIVE = Section(
    name="effective-length",
    title="Effective length",
    kind="effective-length",
    picture="effective",
    views=(
        Bars(
            "Longest length above the limit, tokens",
            of=ANY,
            unit="count",
            columns=lambda score: score.keys[-1].removesuffix("_length"),
            picture=NEVER,
        ),
        Lines(
            "Accuracy at the lengths tried",
            of="results.accuracy",
            name="tried",
            axis=_PROMPT,
            table=ONE,
            details=(
                Detail("limit", "passed", _yes("pass", "fail")),
                Detail("interval above", "clearly", _yes("yes", "no")),
                Detail("right", "num_correct"),
                Detail("of", "num_trials"),
                Detail("tried as", "order"),
            ),
        ),
    ),
)
_PASSKEY = Section(
    name="passkey",
    title="Passkey",
    kind="passkey",
    measured=_depths,
    views=(
        Lines(
            "Passkey accuracy by prompt length",
            of="by_length.accuracy",
            axis=_PROMPT,
            picture=SEVERAL,
            details=(_MEAN_TOKENS, _TRIALS),
        ),
        HeatMap(
            "Passkey accuracy by length and depth",
            of="results.accuracy",
            name="depths",
            rows="depth",
            rows_name="depth",
            spell_row=_depth,
            table=ONE,
        ),
    ),
)
_NEEDLE = Section(
    name="needle",
    title="Needles (RULER)",
    kind="needle",
    measured=_depths,
    views=(
        _by_task("Needles found by prompt length", "by_task.score", picture=SEVERAL),
        _pooled("Needles found by prompt length, all tasks together"),
        _task_map("Needles found by prompt length", "by_task.score"),
        HeatMap(
            "Needles found by length and depth",
            of="results.score",
            name="depths",
            rows="depth",
            rows_name="depth",
            spell_row=_depth,
            panel="task",
            table=NEVER,
            picture=ONE,
        ),
    ),
)
_LONGEVAL = Section(
    name="longeval",
    title="LongEval",
    kind="longeval",
    views=(
        _by_task(
            "LongEval accuracy by number of lines or topics",
            "results.score",
            "number of lines or topics",
            heading="size",
            details=(_MEAN_TOKENS, Detail("cases", "num_trials")),
        ),
    ),
)
_BABILONG = Section(
    name="babilong",
    title="BABILong",
    kind="babilong",
    views=(
        _by_task("BABILong accuracy by length", "results.score", "length of the text", spell=_folder, picture=SEVERAL),
        _pooled("BABILong accuracy by length, all tasks together", spell=_folder),
        _task_map("BABILong accuracy by length", "results.score", spell=_folder),
    ),
)
_TRAINING = Section(
    name="training",
    title="Training runs",
    kind="training",
    must_agree=frozenset({"protocol.id"}),
    unknown="Runs do not record a protocol of what they measure while training: `eval ppl` compares their models.",
    views=(
        Bars(
            "Loss of the last step (nats)",
            of="final_loss",
            unit="nats",
            lower_is_better=None,
            columns=lambda score: "loss",
            picture=NEVER,
        ),
        Lines(
            "Perplexity at the last step that was evaluated, by length",
            of="perplexity.*",
            name="perplexity",
            unit="perplexity",
            lower_is_better=None,
            columns=_key_as_length,
            axis="length (tokens)",
            table=ALWAYS,
        ),
    ),
)


def sections() -> tuple[Section, ...]:
    """Return every section, in the order of a report."""
    evaluations = (_PERPLEXITY, _POSITIONS, _MEMORY, _SHORT, _EFFECTIVE, _PASSKEY, _NEEDLE, _LONGEVAL, _BABILONG)
    classes = [section for kind in EVALS.values() for section in kind.sections]
    return (*evaluations, *classes, _TRAINING)


def section_of(record: Mapping[str, Any]) -> Section:
    """Return the section of a record: that of its kind and protocol, else that of its kind.

    Raises:
        KeyError: no section shows this kind.
    """
    kind, protocol = str(record["kind"]), str((record["protocol"] or {}).get("id"))
    fitting = [section for section in sections() if section.kind == kind and section.protocol in ("", protocol)]
    if not fitting:
        raise KeyError(kind)
    return max(fitting, key=lambda section: bool(section.protocol))


def scores_by_view(section: Section, record: Mapping[str, Any]) -> dict[str, list[Score]]:
    """Return the scores of each view, by the view's name."""
    scores = [score for score in numbers_of(record) if not score.is_count]
    return {view.name: [score for score in scores if view.shows(score)] for view in section.views}
