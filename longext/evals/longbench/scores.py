"""Scores of LongBench: 0 to 100, rounded to hundredths; averages are made of rounded scores, as the authors' are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longext.evals.longbench.metrics import metric_called
from longext.evals.longbench.rows import LongBenchRow
from longext.evals.longbench.tasks import BUCKETS, CATEGORIES, LANGUAGES, TASKS
from longext.evals.statistics import mean_interval, share_interval

Estimate = tuple[float, float, float]  # a number and its 95 % interval
Averages = dict[str, dict[str, Estimate | None]]  # language -> category or "average" -> mean


@dataclass(frozen=True)
class TaskScore:
    """The score of one task.

    Attributes:
        score: 0 to 100; None for LongBench-E, which has buckets.
        buckets: LongBench-E: score by length, None for a bucket without rows.
        low, high: 95 % interval of the score over its rows (`share_interval`); None as the score.
        bucket_intervals: LongBench-E: (low, high) by length.
        num_rows: rows the score is over; missing and empty answers count as 0.
        num_missing: rows that have no answer.
        num_empty: rows whose answer is empty.
        num_unplaced: LongBench-E: rows without a length, in no bucket.
        num_truncated: prompts that lost their middle; None if answers were given, as the next.
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

    def estimate(self, bucket: str | None = None) -> Estimate | None:
        """Return the score and its interval, of LongBench-E in one bucket; None if there is none."""
        score = self.score if bucket is None else (self.buckets or {}).get(bucket)
        interval = (self.low, self.high) if bucket is None else (self.bucket_intervals or {}).get(bucket)
        if score is None or interval is None or interval[0] is None or interval[1] is None:
            return None
        return score, interval[0], interval[1]

    def entry(self) -> dict[str, Any]:
        """Return the score as a record holds it."""
        task = TASKS[self.task]
        return {**asdict(self), "category": task.category, "language": task.language, "metric": task.metric}


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
    name: str,
    answers: Sequence[str | None],
    rows: Sequence[LongBenchRow],
    *,
    ratio: str,
    longbench_e: bool,
    **of_prompts: Any,
) -> TaskScore:
    """Return the score of one task over all its rows; an answer that is None is missing.

    Args:
        of_prompts: `num_truncated` and `num_prompt_tokens`, if a model was asked.
    """
    scores = score_rows(name, answers, rows, ratio)
    counts = {
        "num_rows": len(rows),
        "num_missing": sum(answer is None for answer in answers),
        "num_empty": sum(answer is not None and not answer.strip() for answer in answers),
        **of_prompts,
    }
    if not longbench_e:
        low, high = _interval(scores)
        score = round(100 * sum(scores) / len(scores), 2)
        return TaskScore(task=name, score=score, buckets=None, low=low, high=high, **counts)
    placed: dict[str, list[float]] = {bucket: [] for bucket in BUCKETS}
    for score, row in zip(scores, rows, strict=True):
        if row.length is not None:
            length = row.length
            placed[next(name for name, limit in BUCKETS.items() if limit is None or length < limit)].append(score)
    return TaskScore(
        task=name,
        score=None,
        buckets={name: round(100 * float(np.mean(some)), 2) if some else None for name, some in placed.items()},
        num_unplaced=sum(row.length is None for row in rows),
        bucket_intervals={name: _interval(some) if some else None for name, some in placed.items()},
        **counts,
    )


def _interval(scores: Sequence[float]) -> tuple[float, float]:
    low, high = share_interval(scores)
    return round(100 * low, 2), round(100 * high, 2)


# --- averages ---------------------------------------------------------------------------------------------------------


def averages(estimates: Mapping[str, Estimate | None], longbench_e: bool = False) -> Averages:
    """Return language -> category -> mean of its tasks, and the mean of the six categories, as the authors' tables.

    Code counts in both languages. None if a task of the category, or a category, was not scored: a mean over other
    tasks is another number. LongBench-E has English tasks alone, and fewer in some categories.
    """
    found: Averages = {}
    for title, language in LANGUAGES.items():
        if longbench_e and language != "en":
            continue
        means = {
            category: _mean([estimates.get(name) for name in _tasks_of(category, language, longbench_e)])
            for category in CATEGORIES
        }
        found[title] = {**means, "average": _mean(list(means.values()))}
    return found


def _tasks_of(category: str, language: str, longbench_e: bool) -> list[str]:
    return [
        name
        for name in TASKS
        if TASKS[name].category == category
        and TASKS[name].language in (language, "code")
        and (TASKS[name].is_in_e or not longbench_e)
    ]


def row_weights(name: str, counts: Mapping[str, int]) -> dict[str, float]:
    """Return what a row of each task counts in a score: a task's own, or an average; the most is 1.

    Args:
        counts: rows of each task.
    """
    if name in counts:
        return {name: 1.0}
    groups = [_tasks_of(category, LANGUAGES[name], False) for category in CATEGORIES]
    shares = {task: 1 / (len(group) * counts[task]) for group in groups for task in group}
    return {task: share / max(shares.values()) for task, share in shares.items()}


def least_mean(limit: float) -> float:
    """Return the least mean, 0 to 1, that is rounded to a score of at least `limit`, 0 to 100."""
    return max(0.0, (math.ceil(round(100 * limit, 6)) - 0.5) / 10_000)


def _mean(estimates: Sequence[Estimate | None]) -> Estimate | None:
    known = [estimate for estimate in estimates if estimate is not None]
    if not known or len(known) < len(estimates):
        return None
    return sum(value for value, _, _ in known) / len(known), *mean_interval(known)


def average_entries(scores: Sequence[TaskScore], longbench_e: bool) -> dict[str, Any]:
    """Return `averages` and `average_intervals` of a record: by language, for LongBench-E by bucket and language."""
    found: Any
    if longbench_e:
        by_bucket = {bucket: {score.task: score.estimate(bucket) for score in scores} for bucket in BUCKETS}
        found = {bucket: averages(estimates, longbench_e=True) for bucket, estimates in by_bucket.items()}
    else:
        found = averages({score.task: score.estimate() for score in scores})
    return {
        "averages": _each(found, lambda estimate: round(estimate[0], 2)),
        "average_intervals": _each(found, lambda estimate: [round(bound, 2) for bound in estimate[1:]]),
    }


def _each(table: Any, take: Any) -> Any:
    if isinstance(table, dict):
        return {key: _each(value, take) for key, value in table.items()}
    return None if table is None else take(table)
