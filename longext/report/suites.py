"""What `longext report` shows of each kind of result: which numbers, under which columns, and which way is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from longext.evals.suites.babilong import length_name
from longext.report.scores import Score, numbers_of

Column = int | float | str
ANY = "*"
_LM_EVAL = "longbench-lm-eval"
_HARD_TOKENIZER = frozenset({"model.tokenizer_sha256"})  # a value per token is of that tokenizer's tokens
_MACHINE = frozenset({"model.device", "model.num_threads", "model.dtype", "model.attention"})


def _field(name: str) -> Callable[[Score], Any]:
    return lambda score: score.field(name)


def _key(place: int) -> Callable[[Score], str]:
    return lambda score: score.keys[place]


def _key_as_length(score: Score) -> int:
    return int(score.keys[-1])


def _positions(score: Score) -> str:
    return f"{score.field('start'):,}-{score.field('length'):,}"


def _harness_column(score: Score) -> str:
    named = (score.field("task"), score.field("metric"), score.field("filter"))
    return " ".join(str(name) for name in named if name not in (None, "none"))


def _limit(score: Score) -> str:
    return score.keys[-1].removesuffix("_length")


def _last(_: Score) -> str:
    return "loss"


def _way(score: Score) -> str:
    ratio = score.field("ratio")
    return str(score.field("way")) if ratio is None else f"{score.field('way')} {ratio}x"


def thousands(column: Column) -> str:
    """Return a column as text: 4096 as "4,096"."""
    return column if isinstance(column, str) else f"{column:,}"


def _times(column: Column) -> str:
    return f"{column}x"


def _folder(column: Column) -> str:
    return length_name(int(column))


@dataclass(frozen=True, kw_only=True)
class View:
    """One table and picture of a suite.

    Attributes:
        name: ends its file's name; "" for a suite's first.
        keys: of the scores shown, without rows; `ANY` stands for any key.
        unit: how the numbers are written; see `reporting.report_views`.
        lower_is_better: None where nothing is best; a row's own `higher_is_better` goes before it.
        column, spell: score -> what stands above it, and how that is written.
        panel, panel_name: score -> the block of rows that it belongs to, and what blocks are: tasks.
        variant: score -> what tells rows of one result apart.
        axis: of the columns, where they are numbers to draw lines over; "" for names, drawn as bars.
        scale: score -> what it is measured in, where not all can be drawn on one axis.
        where: fields that a score's rows must have.
        lone: a column that says nothing of a panel where it is the only one.
        pooled: over all tasks of a result, so shown only where results have the same tasks.
        in_table: False for what is only drawn.
        exact: numbers of a machine, which are no samples of anything and need no interval to be told apart.
    """

    title: str
    keys: tuple[str, ...]
    unit: str
    lower_is_better: bool | None = False
    column: Callable[[Score], Column] = _field("length")
    spell: Callable[[Column], str] = thousands
    panel: Callable[[Score], str] | None = None
    panel_name: str = "task"
    variant: Callable[[Score], str] | None = None
    axis: str = ""
    scale: Callable[[Score], str] | None = None
    name: str = ""
    where: Mapping[str, Any] | None = None
    lone: str = ""
    pooled: bool = False
    in_table: bool = True
    in_picture: bool = True
    exact: bool = False

    def shows(self, score: Score) -> bool:
        """True where a score is one of this view."""
        if len(score.keys) != len(self.keys):
            return False
        same = all(own in (ANY, key) for own, key in zip(self.keys, score.keys, strict=True))
        return same and all(score.field(name) == value for name, value in (self.where or {}).items())

    def is_lower_better(self, score: Score) -> bool | None:
        """Return which way is better for this score, None where neither is."""
        higher = score.field("higher_is_better")
        return self.lower_is_better if higher is None else not higher


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A section of a report.

    Attributes:
        must_agree: fields of `model` that must agree beside protocol and data for numbers to stand in one table.
        measured: record -> what else must agree, that its numbers or its model say.
        unknown: why results of this suite cannot be told to be comparable, "" where their record says.
    """

    name: str
    title: str
    views: tuple[View, ...]
    must_agree: frozenset[str] = frozenset()
    measured: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda record: {}
    unknown: str = ""


_TOKENS, _PROMPT, _BEFORE = "context length (tokens)", "prompt length (tokens)", "context before the segment (tokens)"


def _by_task(title: str, key: str, axis: str = _PROMPT, spell: Callable[[Column], str] = thousands) -> View:
    return View(title=title, keys=(key, "score"), unit="share", panel=_field("task"), axis=axis, spell=spell)


def _pooled(title: str, spell: Callable[[Column], str] = thousands) -> View:
    """All tasks together; drawn where the tasks are, one by one."""
    return View(
        name="all",
        title=title,
        keys=("by_length", "score"),
        unit="share",
        axis=_PROMPT,
        spell=spell,
        pooled=True,
        in_picture=False,
    )


def _longest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The longest context has its say in where segments are taken, at every length."""
    return {"longest context": max(row["length"] for row in record["results"])}


def _windows(record: Mapping[str, Any]) -> dict[str, Any]:
    rows = record["results"]
    return {"window": max(row["length"] for row in rows), "buckets": len(rows)}


def _depths(record: Mapping[str, Any]) -> dict[str, Any]:
    depths = {row.get("depth") for row in record["results"]} - {None}
    return {"depths": sorted(depths)} if depths else {}


def _segment(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"segment": (record["model"].get("compressor") or {}).get("segment")}


def _efficiency(key: str, title: str, unit: str, lower: bool = True) -> View:
    return View(
        name=key.replace("_", "-"),
        title=title,
        keys=("results", key),
        unit=unit,
        lower_is_better=lower,
        variant=_way,
        axis=_TOKENS,
        exact=True,
    )


def _reconstruction(metric: str, title: str, unit: str) -> View:
    return View(
        name=metric.replace("_", "-"),
        title=title,
        keys=("results", "metrics", metric, "mean"),
        unit=unit,
        column=_field("ratio"),
        spell=_times,
        panel=_field("content"),
        panel_name="content",
        axis="compression ratio",
    )


_SUITES = (
    Suite(
        name="perplexity",
        title="Perplexity",
        must_agree=_HARD_TOKENIZER,
        views=(
            View(
                title="Perplexity by context length",
                keys=("results", "ppl"),
                unit="perplexity",
                lower_is_better=True,
                axis=_TOKENS,
            ),
        ),
    ),
    Suite(
        name="positions",
        title="Loss by position",
        must_agree=_HARD_TOKENIZER,
        measured=_windows,
        views=(
            View(
                title="NLL by position in the window, nats per token",
                keys=("results", "nll"),
                unit="nats",
                lower_is_better=True,
                column=_positions,
                axis="position in the window (tokens)",
            ),
        ),
    ),
    Suite(
        name="memory-perplexity",
        title="Perplexity with a memory",
        must_agree=_HARD_TOKENIZER,
        measured=_longest,
        views=(
            View(
                title="Perplexity of the next segment by context",
                keys=("results", "ppl"),
                unit="perplexity",
                lower_is_better=True,
                axis=_BEFORE,
                where={"method": "memory"},
            ),
            View(
                name="controls",
                title="NLL of the memory minus that of its own controls, nats (below 0: the memory is better)",
                keys=("results", "difference"),
                unit="signed",
                lower_is_better=None,
                panel=_field("method"),
                panel_name="control",
                axis=_BEFORE,
            ),
        ),
    ),
    Suite(
        name="short-context",
        title="Short texts",
        views=(
            View(
                title="Change of perplexity against the base",
                keys=("results", "change"),
                unit="change",
                lower_is_better=True,
                axis=_TOKENS,
            ),
        ),
    ),
    Suite(
        name="effective-length",
        title="Effective length",
        views=(
            View(
                title="Longest length above the bar, tokens", keys=(ANY,), unit="count", column=_limit, in_picture=False
            ),
            View(
                name="tried",
                title="Accuracy at the lengths tried",
                keys=("results", "accuracy"),
                unit="share",
                axis=_PROMPT,
                in_table=False,
            ),
        ),
    ),
    Suite(
        name="passkey",
        title="Passkey",
        measured=_depths,
        views=(
            View(
                title="Passkey accuracy by prompt length",
                keys=("by_length", "accuracy"),
                unit="share",
                axis=_PROMPT,
            ),
        ),
    ),
    Suite(
        name="needle",
        title="Needles (RULER)",
        measured=_depths,
        views=(
            _by_task("Needles found by prompt length", "by_task"),
            _pooled("Needles found by prompt length, all tasks together"),
        ),
    ),
    Suite(
        name="longeval",
        title="LongEval",
        views=(_by_task("LongEval accuracy by number of lines or topics", "results", "number of lines or topics"),),
    ),
    Suite(
        name="babilong",
        title="BABILong",
        views=(
            _by_task("BABILong accuracy by length", "results", "length of the text", _folder),
            _pooled("BABILong accuracy by length, all tasks together", _folder),
        ),
    ),
    Suite(
        name="longbench",
        title="LongBench",
        views=(
            View(
                title="LongBench averages, as the authors report them",
                keys=("averages", ANY, ANY),
                unit="points",
                column=_key(2),
                panel=_key(1),
                panel_name="language",
                lone="code",  # counts in both languages
            ),
            View(
                name="tasks",
                title="LongBench by task",
                keys=("results", "score"),
                unit="points",
                column=_field("task"),
            ),
        ),
    ),
    Suite(
        name="longbench-e",
        title="LongBench-E",
        views=(
            View(
                title="LongBench-E averages by words of context",
                keys=("averages", ANY, "english", ANY),
                unit="points",
                column=_key(3),
                panel=_key(1),
                panel_name="words",
            ),
            View(
                name="tasks",
                title="LongBench-E by task and words of context",
                keys=("results", "buckets", ANY),
                unit="points",
                column=_key(2),
                panel=_field("task"),
            ),
        ),
    ),
    Suite(
        name=_LM_EVAL,
        title="LongBench under lm-eval's protocol (not the authors')",
        views=(
            View(
                title="LongBench averages of lm-eval's groups, not comparable with the authors'",
                keys=("averages", ANY, ANY),
                unit="points",
                column=_key(2),
            ),
            View(
                name="tasks",
                title="LongBench by task under lm-eval's protocol, not comparable with the authors'",
                keys=("results", "score"),
                unit="points",
                column=_field("task"),
            ),
        ),
    ),
    Suite(
        name="harness",
        title="lm-eval",
        views=(
            View(
                title="lm-eval tasks",
                keys=("results", "value"),
                unit="value",
                column=_harness_column,
                scale=_field("metric"),
            ),
        ),
    ),
    Suite(
        name="reconstruction",
        title="Reconstruction from memory",
        measured=_segment,
        views=(
            _reconstruction("bleu", "BLEU-4 of what came back, by compression ratio", "fraction"),
            _reconstruction("accuracy", "Token accuracy, teacher-forced, by compression ratio", "percent"),
            _reconstruction("bits_saved", "Bits saved per token by compression ratio", "fraction"),
        ),
    ),
    Suite(
        name="efficiency",
        title="Efficiency",
        must_agree=_MACHINE,
        views=(
            _efficiency("prefill_seconds", "Prefill, seconds", "seconds"),
            _efficiency("decode_tokens_per_second", "Decoding, tokens a second", "rate", lower=False),
            _efficiency("kv_bytes", "Bytes of keys and values held", "bytes"),
            _efficiency("peak_bytes", "Peak memory above model and input", "bytes"),
        ),
    ),
    Suite(
        name="training",
        title="Training runs",
        must_agree=frozenset({"protocol.id"}),
        unknown="Runs do not record a protocol of what they measure while training: `eval ppl` compares their models.",
        views=(
            View(
                title="Loss of the last step (nats)",
                keys=("final_loss",),
                unit="nats",
                lower_is_better=None,
                column=_last,
                in_picture=False,
            ),
            View(
                name="perplexity",
                title="Perplexity at the last step that was evaluated, by length",
                keys=("perplexity", ANY),
                unit="perplexity",
                lower_is_better=None,
                column=_key_as_length,
                axis="length (tokens)",
            ),
        ),
    ),
)
SUITES = {suite.name: suite for suite in _SUITES}
TRAINING = ("finetune", "compress-train")
_NO_KINDS = ("positions", "longbench-e", _LM_EVAL, "training")
KINDS = (*(name for name in SUITES if name not in _NO_KINDS), "compare", *TRAINING)


def suite_of(record: Mapping[str, Any]) -> Suite:
    """Return the section that an evaluation's record belongs to."""
    special = {"ppl/positional": "positions", "longbench-e-official": "longbench-e", "longbench-lm-eval": _LM_EVAL}
    protocol, kind = str((record["protocol"] or {}).get("id")), str(record["kind"])
    return SUITES[special.get(protocol, kind)]


def views_of(suite: Suite, record: Mapping[str, Any]) -> dict[str, list[Score]]:
    """Return the scores of each view, by the view's name."""
    scores = [score for score in numbers_of(record) if not score.is_count]
    return {view.name: [score for score in scores if view.shows(score)] for view in suite.views}
