"""LongBench under its authors' protocol (Bai et al., arXiv 2308.14508): prompts, cuts, scores and averages.

Prompts longer than `max_length` lose their middle, by tokens; few-shot and code prompts never go through a chat
template; answers are greedy; scores are 0 to 100, rounded to hundredths, and averages are made of rounded scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longext.errors import ConfigError
from longext.evals.config import LongBenchConfig
from longext.evals.limits import POINTS, check_names, read_limits, verdict
from longext.evals.longbench.metrics import CODE_RATIOS, NEED_JIEBA, has_jieba, metric_called
from longext.evals.longbench.rows import LongBenchRow
from longext.evals.longbench.tasks import BUCKETS, CATEGORIES, TASKS, fill_prompt, read_prompt
from longext.evals.statistics import mean_interval, share_interval
from longext.models.answers import Request
from longext.models.chat import chat_tokens, user_text
from longext.models.methods import check_method
from longext.models.protocol import LanguageModel
from longext.registry import did_you_mean

LANGUAGES = {"en": "English", "zh": "Chinese"}
BACKENDS = ("official", "lm-eval")
_SAMSUM = "samsum"  # ends at a line feed, which may not come first


@dataclass(frozen=True)
class TaskScore:
    """The score of one task.

    Attributes:
        score: 0 to 100; None for LongBench-E, which has buckets, and where words of Chinese text cannot be told.
        buckets: LongBench-E: score by length, None for a bucket without rows.
        low, high: 95 % interval of the score over its rows (`share_interval`); None as the score.
        bucket_intervals: LongBench-E: (low, high) by length.
        num_rows: rows the score is over; missing and empty answers count as 0.
        num_missing: rows that have no answer.
        num_empty: rows whose answer is empty.
        num_unplaced: LongBench-E: rows without a length, in no bucket.
        num_truncated: prompts that lost their middle; None where answers were given, as the next.
        num_prompt_tokens: mean length of the prompts as read.
    """

    task: str
    score: float | None
    buckets: dict[str, float | None] | None
    num_rows: int
    num_missing: int
    num_empty: int
    num_unplaced: int = 0
    num_truncated: int | None = None
    num_prompt_tokens: float | None = None
    low: float | None = None
    high: float | None = None
    bucket_intervals: dict[str, tuple[float, float] | None] | None = None


# --- what is asked for ------------------------------------------------------------------------------------------------


def check_longbench_config(config: LongBenchConfig) -> None:
    """Raise ConfigError for an unknown task or value, MissingExtraError where a task named needs jieba."""
    if config.backend not in BACKENDS:
        raise ConfigError(f"Unknown --backend '{config.backend}'. {did_you_mean(config.backend, BACKENDS)}")
    for name in config.tasks:
        task = TASKS[name]
        if config.longbench_e and not task.is_in_e:
            known = [task for task in TASKS if TASKS[task].is_in_e]
            raise ConfigError(f"LongBench-E has no task '{name}'. {did_you_mean(name, known)}")
    if len(set(config.tasks)) < len(config.tasks):
        raise ConfigError(f"--tasks names a task twice: {', '.join(config.tasks)}.")
    if config.code_similarity not in CODE_RATIOS:
        raise ConfigError(
            f"Unknown --code-similarity '{config.code_similarity}'. {did_you_mean(config.code_similarity, CODE_RATIOS)}"
        )
    check_method(config.method, config.factor)
    bars = _bars(config)
    if bars and config.longbench_e:
        raise ConfigError("--fail-under is for LongBench's single scores, and LongBench-E has one for each length.")
    unmeasured = [name for name in bars if config.tasks and name in TASKS and name not in config.tasks]
    if unmeasured:
        raise ConfigError(f"--fail-under {unmeasured[0]}: the task is not among --tasks {','.join(config.tasks)}.")
    unscorable = [name for name in (*config.tasks, *bars) if name in TASKS and TASKS[name].metric in NEED_JIEBA]
    if unscorable and not has_jieba():
        raise ConfigError(
            f"{', '.join(dict.fromkeys(unscorable))} is scored on the words that jieba finds in Chinese text, and it "
            "is not installed: pip install jieba"
        )


def _bars(config: LongBenchConfig) -> dict[str, float]:
    """Return name -> least score of --fail-under; `english` and `chinese` name the averages."""
    bars = read_limits(config.fail_under, form="TASK=SCORE", scale=POINTS)
    check_names(bars, [*TASKS, *map(str.lower, LANGUAGES.values())])
    return bars


def check_bars(config: LongBenchConfig, names: Sequence[str]) -> None:
    """Raise ConfigError for a bar on a task, or an average, that a run of the tasks `names` does not give."""
    means = averages(dict.fromkeys(names, 0.0))
    for name in _bars(config):
        if name in TASKS and name not in names:
            raise ConfigError(f"--fail-under {name}: {name} is not scored here. Scored: {', '.join(names)}.")
        if name in means and means[name]["average"] is None:
            raise ConfigError(f"--fail-under {name}: the average needs every task of its table, and some are left out.")


def wanted_tasks(config: LongBenchConfig) -> list[str]:
    """Return the tasks asked for; without --tasks all that can be scored here, LongBench-E's with --e."""
    names = [name for name in TASKS if TASKS[name].is_in_e or not config.longbench_e]
    return list(config.tasks) or [name for name in names if has_jieba() or TASKS[name].metric not in NEED_JIEBA]


def file_stem(task: str, longbench_e: bool) -> str:
    """Return what the authors call the data of a task: <task>, or <task>_e."""
    return f"{task}_e" if longbench_e else task


# --- prompts ----------------------------------------------------------------------------------------------------------


def default_max_length(context: int) -> int:
    """Return the length that prompts are cut to: 1,000 for each 1,024 of the context less 500, as the authors' table.

    That is 3,500 for 4,096 positions, 15,500 for 16,384, 31,500 for 32,768; half the context where it is small.
    """
    return max(context // 1024 * 1000 - 500, context // 2)


def cut_middle(
    text: str, max_length: int | None, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> tuple[str, bool]:
    """Return the text, and whether it was longer than `max_length` tokens, BOS counted, and so lost its middle.

    What remains is the text of the first and of the last max_length // 2 tokens, put together as text: it is encoded
    anew, so it may have a few tokens more or less, and an odd `max_length` loses one.
    """
    ids = encode(text)
    if max_length is None or len(ids) <= max_length:
        return text, False
    half = max_length // 2
    return decode(ids[:half]) + decode(ids[-half:]), True


def build_requests(
    model: LanguageModel, name: str, rows: Sequence[LongBenchRow], max_length: int | None, chat: bool
) -> tuple[list[Request], int]:
    """Return the prompts of one task as they go into the model, and how many lost their middle.

    The cut comes before the chat template, so the template stays whole, and what is read may be longer than
    `max_length` by it.
    """
    task, prompt = TASKS[name], read_prompt(name)
    stop: tuple[int, ...] = ()
    if name == _SAMSUM:
        stop = (model.encode("\n", add_bos=False)[-1],)
    requests, num_truncated = [], 0
    for index, row in enumerate(rows):
        text = fill_prompt(prompt, user_text(model, row.context), user_text(model, row.question))
        text, is_cut = cut_middle(text, max_length, model.encode, model.decode)
        num_truncated += is_cut
        ids = chat_tokens(model, text) if chat and task.has_chat else model.encode(text)
        least = 1 if stop else 0
        requests.append(
            Request(f"{name}:{index}", tuple(ids), task.max_new_tokens, stop_ids=stop, min_new_tokens=least)
        )
    return requests, num_truncated


# --- scores -----------------------------------------------------------------------------------------------------------


def score_rows(name: str, answers: Sequence[str | None], rows: Sequence[LongBenchRow], ratio: str) -> list[float]:
    """Return the score of each answer, 0 to 1: the best over the references; 0 for None."""
    task = TASKS[name]
    metric = metric_called(task.metric, ratio)
    scores = []
    for answer, row in zip(answers, rows, strict=True):
        text = answer or ""
        if task.first_line:
            text = text.lstrip("\n").split("\n")[0]
        best = max((metric(text, reference, row.all_classes) for reference in row.answers), default=0.0)
        scores.append(0.0 if answer is None else best)
    return scores


def score_task(
    name: str, answers: Sequence[str | None], rows: Sequence[LongBenchRow], *, ratio: str, longbench_e: bool
) -> TaskScore:
    """Return the score of one task over all its rows; an answer that is None is missing."""
    scores = score_rows(name, answers, rows, ratio)
    unplaced = sum(row.length is None for row in rows) if longbench_e else 0
    low, high = (None, None) if longbench_e else _interval(scores)
    placed = _in_buckets(scores, rows) if longbench_e else {}
    return TaskScore(
        task=name,
        score=None if longbench_e else round(100 * sum(scores) / len(scores), 2),
        buckets={name: _mean_score(own) for name, own in placed.items()} if longbench_e else None,
        num_rows=len(rows),
        num_missing=sum(answer is None for answer in answers),
        num_empty=sum(answer is not None and not answer.strip() for answer in answers),
        num_unplaced=unplaced,
        low=low,
        high=high,
        bucket_intervals={name: _interval(own) if own else None for name, own in placed.items()} or None,
    )


def _interval(scores: Sequence[float]) -> tuple[float, float]:
    low, high = share_interval(scores)
    return round(100 * low, 2), round(100 * high, 2)


def _mean_score(scores: Sequence[float]) -> float | None:
    return round(100 * float(np.mean(scores)), 2) if scores else None


def _in_buckets(scores: Sequence[float], rows: Sequence[LongBenchRow]) -> dict[str, list[float]]:
    own: dict[str, list[float]] = {bucket: [] for bucket in BUCKETS}
    for score, row in zip(scores, rows, strict=True):
        if row.length is not None:
            length = row.length
            bucket = next(name for name, limit in BUCKETS.items() if limit is None or length < limit)
            own[bucket].append(score)
    return own


def averages(scores: Mapping[str, float | None], longbench_e: bool = False) -> dict[str, Any]:
    """Return category -> mean of its tasks, and the mean of the six categories, by language, as the authors' tables.

    Code counts in both languages. None where a task of the category, or a category, was not scored: a mean over
    other tasks is another number. LongBench-E has English tasks alone, and fewer in some categories.
    """
    result: dict[str, Any] = {}
    for language, title in LANGUAGES.items():
        if longbench_e and language != "en":
            continue
        means: dict[str, float | None] = {}
        for category in CATEGORIES:
            means[category] = _mean([scores.get(name) for name in _tasks_of(category, language, longbench_e)])
        result[title.lower()] = {**_rounded(means), "average": _rounded({"": _mean(list(means.values()))})[""]}
    return result


def _tasks_of(category: str, language: str, longbench_e: bool) -> list[str]:
    """Return the tasks of a category in a language; code counts in both."""
    return [
        name
        for name in TASKS
        if TASKS[name].category == category
        and TASKS[name].language in (language, "code")
        and (TASKS[name].is_in_e or not longbench_e)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _rounded(means: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: None if value is None else round(value, 2) for key, value in means.items()}


def all_averages(scores: Sequence[TaskScore], longbench_e: bool) -> dict[str, Any]:
    """Return `averages`; for LongBench-E by bucket."""
    if not longbench_e:
        return averages({score.task: score.score for score in scores})
    return {
        bucket: averages({score.task: (score.buckets or {}).get(bucket) for score in scores}, longbench_e=True)
        for bucket in BUCKETS
    }


def average_intervals(scores: Sequence[TaskScore], longbench_e: bool) -> dict[str, Any]:
    """Return the 95 % interval [low, high] of each mean of `all_averages`, in the same places (see `mean_interval`)."""
    if not longbench_e:
        known = {own.task: (own.score, own.low, own.high) for own in scores}
        return {title.lower(): _mean_intervals(known, code) for code, title in LANGUAGES.items()}
    found = {}
    for bucket in BUCKETS:
        known = {
            own.task: (
                (own.buckets or {}).get(bucket),
                *((own.bucket_intervals or {}).get(bucket) or (None, None)),
            )
            for own in scores
        }
        found[bucket] = {"english": _mean_intervals(known, "en", longbench_e=True)}
    return found


def _mean_intervals(
    known: Mapping[str, tuple[float | None, float | None, float | None]], language: str, longbench_e: bool = False
) -> dict[str, list[float] | None]:
    """Return category -> [low, high] of the mean of its tasks, and that of the six means; None as the means."""
    found: dict[str, tuple[float, float, float] | None] = {}
    for category in CATEGORIES:
        found[category] = _mean_estimate([known.get(name) for name in _tasks_of(category, language, longbench_e)])
    found["average"] = _mean_estimate(list(found.values()))
    return {key: None if own is None else [round(own[1], 2), round(own[2], 2)] for key, own in found.items()}


def _mean_estimate(
    estimates: Sequence[tuple[float | None, float | None, float | None] | None],
) -> tuple[float, float, float] | None:
    known = [own for own in estimates if own is not None and None not in own]
    if not known or len(known) < len(estimates):
        return None
    values: Any = known
    return sum(own[0] for own in values) / len(values), *mean_interval(values)


def bar_verdicts(config: LongBenchConfig, scores: Sequence[TaskScore]) -> list[dict[str, Any]]:
    """Return the bars of --fail-under with what was scored."""
    known: dict[str, float | None] = {score.task: score.score for score in scores}
    means = {language: mean["average"] for language, mean in all_averages(scores, False).items()}
    return [verdict(name, limit, {**means, **known}.get(name)) for name, limit in _bars(config).items()]


def score_entry(score: TaskScore) -> dict[str, Any]:
    """Return a score as it stands in a record."""
    task = TASKS[score.task]
    return {**asdict(score), "category": task.category, "language": task.language, "metric": task.metric}
