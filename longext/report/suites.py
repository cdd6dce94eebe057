"""The sections of a report, one or more for each kind of result: which numbers, in which columns, what is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longext.evals.base import EVALS
from longext.evals.views import ALWAYS, NEVER, SEVERAL, TOKENS, Bars, Column, Detail, Lines, Score, Section, either
from longext.report.scores import numbers_of

_MACHINE = frozenset({"model.device", "model.num_threads", "model.dtype", "model.attention"})


def _key(place: int) -> Callable[[Score], str]:
    return lambda score: score.keys[place]


def _key_as_length(score: Score) -> int:
    return int(score.keys[-1])


def _harness_column(score: Score) -> str:
    named = (score.field("task"), score.field("metric"), score.field("filter"))
    return " ".join(str(name) for name in named if name not in (None, "none"))


def _way(score: Score) -> str:
    ratio = score.field("ratio")
    return str(score.field("way")) if ratio is None else f"{score.field('way')} {ratio}x"


def _times(column: Column) -> str:
    return f"{column}x"


def _estimate(form: str) -> Callable[[Mapping[str, Any]], str]:
    def text(value: Mapping[str, Any]) -> str:
        between = "" if value.get("low") is None else f" ({form} to {form})".format(value["low"], value["high"])
        return form.format(value["mean"]) + between

    return text


def _segment(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"segment": (record["model"].get("compressor") or {}).get("segment")}


def _efficiency(key: str, title: str, unit: str, lower: bool = True, **more: Any) -> Lines:
    return Lines(
        title,
        of=f"results.{key}",
        name=key.replace("_", "-"),
        unit=unit,
        lower_is_better=lower,
        variant=_way,
        axis=TOKENS,
        exact=True,
        **more,
    )


def _reconstruction(metric: str, title: str, unit: str, **more: Any) -> Lines:
    return Lines(
        title,
        of=f"results.metrics.{metric}.mean",
        name=metric.replace("_", "-"),
        unit=unit,
        columns="ratio",
        heading="ratio",
        spell=_times,
        panel="content",
        panel_name="content",
        axis="compression ratio",
        **more,
    )


_ANSWERED = (
    Detail("category", "category"),
    Detail("metric", "metric"),
    Detail("rows", "num_rows"),
    Detail("empty", "num_empty"),
    Detail("missing", "num_missing"),
    Detail("cut", "num_truncated"),
    Detail("tokens", "num_prompt_tokens", "{:,.0f}"),
)
_OF_ANSWERS: dict[str, Any] = {
    "name": "tasks",
    "unit": "points",
    "value": "score",
    "note": "0 to 100; cut: prompts that were too long; tokens: mean length of a prompt as read",
}
_LONGBENCH = Section(
    name="longbench",
    title="LongBench",
    kind="longbench",
    views=(
        Bars(
            "LongBench averages, as the authors report them",
            of="averages.*.*",
            unit="points",
            columns=_key(2),
            panel=_key(1),
            panel_name="language",
            lone="code",  # counts in both languages
            picture=SEVERAL,
        ),
        Bars(
            "LongBench by task",
            of="results.score",
            columns="task",
            heading="task",
            shade="category",
            details=_ANSWERED,
            **_OF_ANSWERS,
        ),
    ),
)
_LONGBENCH_E = Section(
    name="longbench-e",
    title="LongBench-E",
    kind="longbench",
    protocol="longbench-e-official",
    picture="longbench",
    views=(
        Bars(
            "LongBench-E averages by words of context",
            of="averages.*.english.*",
            unit="points",
            columns=_key(3),
            panel=_key(1),
            panel_name="words",
            picture=SEVERAL,
        ),
        Bars(
            "LongBench-E by task and words of context",
            of="results.buckets.*",
            columns=_key(2),
            heading="words",
            panel="task",
            shade="category",
            details=_ANSWERED,
            **_OF_ANSWERS,
        ),
    ),
)
_LONGBENCH_LM_EVAL = Section(
    name="longbench-lm-eval",
    title="LongBench under lm-eval's protocol (not the authors')",
    kind="longbench",
    protocol="longbench-lm-eval",
    picture="longbench",
    views=(
        Bars(
            "LongBench averages of lm-eval's groups, not comparable with the authors'",
            of="averages.*.*",
            unit="points",
            columns=_key(2),
            picture=SEVERAL,
        ),
        Bars(
            "LongBench by task under lm-eval's protocol, not comparable with the authors'",
            of="results.score",
            columns="task",
            heading="task",
            shade="category",
            details=_ANSWERED,
            **_OF_ANSWERS,
        ),
    ),
)
_HARNESS = Section(
    name="harness",
    title="lm-eval",
    kind="harness",
    views=(
        Bars(
            "lm-eval tasks",
            of="results.value",
            unit="value",
            columns=_harness_column,
            heading="task",
            scale="metric",
            value="value",
            details=(
                Detail("better", "higher_is_better", either("more", "less")),
                Detail("shots", "num_fewshot"),
                Detail("documents", "num_documents"),
                Detail("cut", "num_truncated"),
            ),
            note="as lm-eval scales them; intervals are of its standard errors, Wilson's if all or none are right; "
            "cut: documents that lost the beginning of a prompt",
        ),
    ),
)
_RECONSTRUCTION = Section(
    name="reconstruction",
    title="Reconstruction from memory",
    kind="reconstruction",
    measured=_segment,
    views=(
        _reconstruction(
            "bleu",
            "BLEU-4 of what came back, by compression ratio",
            "fraction",
            value="BLEU-4",
            details=(
                Detail("sentence", "metrics.sentence_bleu.mean", "{:.3f}"),
                Detail("median", "metrics.sentence_bleu.median", "{:.3f}"),
                Detail("ROUGE-L", "metrics.rouge_l", _estimate("{:.3f}")),
                Detail("exact prefix", "metrics.exact_prefix.mean", "{:.1%}"),
                Detail("exact match", "metrics.exact_match.mean", "{:.1%}"),
            ),
            note="greedy decoding; BLEU-4 of the corpus, then mean and median of single segments; no smoothing",
        ),
        _reconstruction(
            "accuracy",
            "Token accuracy, teacher-forced, by compression ratio",
            "percent",
            details=(
                Detail("CE memory", "metrics.ce_memory.mean", "{:.3f}"),
                Detail("CE none", "metrics.ce_none.mean", "{:.3f}"),
                Detail("CE base", "metrics.ce_base.mean", "{:.3f}"),
                Detail("bits saved", "metrics.bits_saved", _estimate("{:.3f}")),
            ),
            note="CE in nats per token: with the memory, without it (both after the repeat token), and of the base "
            "model alone; bits saved per token: (none - memory) / ln 2",
        ),
        _reconstruction("bits_saved", "Bits saved per token by compression ratio", "fraction", table=SEVERAL),
    ),
)
_EFFICIENCY = Section(
    name="efficiency",
    title="Efficiency",
    kind="efficiency",
    must_agree=_MACHINE,
    views=(
        _efficiency(
            "prefill_seconds",
            "Prefill, seconds",
            "seconds",
            value="prefill (s)",
            details=(
                Detail("tokens/s", "prefill_tokens_per_second", "{:,.0f}"),
                Detail("us/token", "prefill_microseconds", "{:,.1f}"),
                Detail("formula", "marginal_bytes_formula", "{:,.0f}"),
                Detail("KV B/token", "kv_bytes_per_token", "{:,.0f}"),
            ),
            note="KV: bytes after the prefill, raw rest and sink included; formula: bytes of one more token",
        ),
        _efficiency("decode_tokens_per_second", "Decoding, tokens a second", "rate", lower=False),
        _efficiency("kv_bytes", "Bytes of keys and values held", "bytes"),
        _efficiency("peak_bytes", "Peak memory above model and input", "bytes"),
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
    evaluations = [section for kind in EVALS.values() for section in kind.sections]
    others = (_LONGBENCH, _LONGBENCH_E, _LONGBENCH_LM_EVAL, _HARNESS, _RECONSTRUCTION, _EFFICIENCY)
    return (*evaluations, *others, _TRAINING)


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
