"""Questions asked in a random order until every limit of an evaluation has its verdict."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longext.errors import ConfigError
from longext.evals.limits import PlaceLimit, verdict
from longext.settings import option

_GROWTH = 8  # a round asks for an eighth of what was asked before, or a batch: few rounds, little asked in vain
NOT_ASKED = "--error-rate stops asking a model, and --predictions has the answers: leave it out."
STOPPING = (
    "prompts in random order (by the seed), without replacement; a verdict is that of all planned prompts, and ends "
    "the asking once a bet against the opposite has won 1 / error rate (Waudby-Smith and Ramdas, arXiv 2006.04347), "
    "or no answer left can change it"
)


def error_rate() -> Any:
    """Return the field of --error-rate."""
    text = (
        "Stop asking once the verdicts of --fail-under are certain, each run wrong with at most this probability "
        "(0.05: 95 % certain; 0: no answer left can change them)."
    )
    return option(None, text, ge=0, le=0.5, panel="Output")


def stopping_facts(error_rate: float | None) -> dict[str, Any]:
    """Return what the protocol of a record says of an error rate; nothing if there is none."""
    return {} if error_rate is None else {"error_rate": error_rate, "stopping": STOPPING}


def rounds_path(output: Path) -> Path:
    """Return the folder of answers to questions that are asked in rounds."""
    return output.with_name(f"{output.name}.rounds")


def check_error_rate(task: Any) -> None:
    """Raise ConfigError for an error rate without a limit to decide, or with answers that are given."""
    if task.error_rate is None:
        return
    if not task.fail_under:
        raise ConfigError("--error-rate stops asking once --fail-under is decided: give that too.")
    if getattr(task, "predictions", None) is not None:
        raise ConfigError(NOT_ASKED)


class Decisions:
    """The verdicts on limits, while questions are answered.

    A limit that wrongly passes makes a run pass only if it is the one that misses, so each passes with an error of
    `error`; any of them that wrongly fails makes the run fail, so they share it.

    Args:
        questions: each with `task` and `length`.
        spell: a length as limits spell it.
        grain: all scores are multiples of it; 0 if that is not known.
        weigh: (limit, question) -> 0 to 1, what the question's score counts in the mean that the limit is of; default 1
            at the limit's task and length. A weighted mean is that of score times weight, a value of 0 to 1 as scores
            are, over the mean weight.
    """

    def __init__(
        self,
        limits: Sequence[PlaceLimit],
        questions: Sequence[Any],
        *,
        error: float,
        seed: int,
        spell: Callable[[int], str] = str,
        grain: float = 0,
        weigh: Callable[[PlaceLimit, Any], float] | None = None,
    ) -> None:
        from longext.evals.sequential.means import MeanTest

        self.planned, self.num_asked, self.error = len(questions), 0, error
        self._waiting = random.Random(f"{seed} order").sample(list(questions), len(questions))
        self._limits, self._spell = limits, spell
        self._weigh = weigh or self._counts
        self._tests, self._shares = list[MeanTest](), list[float]()
        for limit in limits:
            weights = [weight for question in questions if (weight := self._weigh(limit, question))]
            share = sum(weights) / len(weights) if weights else 1.0
            self._tests.append(MeanTest(limit.limit * share, len(weights), error, error / len(limits), grain))
            self._shares.append(share)

    def _counts(self, limit: PlaceLimit, question: Any) -> float:
        return float(limit.task in (None, question.task) and limit.length in (None, self._spell(question.length)))

    def _is_open(self, question: Any) -> bool:
        pairs = zip(self._limits, self._tests, strict=True)
        return any(test.verdict is None and self._weigh(limit, question) > 0 for limit, test in pairs)

    def next(self, size: int) -> list[Any]:
        """Return questions to ask next, at least `size` if there are any that a verdict waits for."""
        self._waiting = [question for question in self._waiting if self._is_open(question)]
        count = max(size, self.num_asked // _GROWTH)
        chosen, self._waiting = self._waiting[:count], self._waiting[count:]
        return chosen

    def add(self, questions: Sequence[Any], scores: Sequence[float]) -> None:
        """Take the scores of questions that `next` returned, 0 to 1."""
        pairs = list(zip(questions, scores, strict=True))
        self.num_asked += len(pairs)
        for limit, test in zip(self._limits, self._tests, strict=True):
            weighed = [(self._weigh(limit, question), score) for question, score in pairs]
            test.add([weight * score for weight, score in weighed if weight])

    def ask(self, size: int, answer: Callable[[list[Any]], Sequence[float]]) -> None:
        """Ask until every limit has its verdict.

        Args:
            size: questions of a round, at least.
            answer: returns the score of each question.
        """
        while questions := self.next(size):
            self.add(questions, answer(questions))

    @property
    def num_decisive(self) -> int:
        """The answers until the verdict that took most of them."""
        return max(len(test.values) for test in self._tests)

    @property
    def passed(self) -> list[bool]:
        """The verdict on each limit."""
        return [bool(test.verdict) for test in self._tests]

    def rows(self) -> list[dict[str, Any]]:
        """Return the verdicts as records hold them, with the interval of the score of all planned prompts."""
        from longext.evals.sequential.means import planned_interval

        rows = []
        for limit, test, share, passed in zip(self._limits, self._tests, self._shares, self.passed, strict=True):
            low, high = planned_interval(test.values, test.total, self.error) if test.values else (0.0, share)
            low, high = min(1.0, low / share), min(1.0, high / share)
            value = None if test.mean is None else min(1.0, test.mean / share)
            more = {"low": low, "high": high, "num_asked": len(test.values), "num_planned": test.total}
            rows.append({**verdict(limit.name, limit.limit, value), "passed": passed, **more})
        return rows

    def note(self, unit: str) -> str:
        """Return how much was asked, in words."""
        how = f"wrong in at most {self.error:.2g} of runs" if self.error else "no other answer can change them"
        return f"Asked {self.num_asked} of {self.planned} {unit}: the verdicts are certain ({how})."


def ask_questions(
    decisions: Decisions | None, questions: Sequence[Any], size: int, answer: Callable[[list[Any]], Sequence[float]]
) -> int:
    """Ask all questions at once; with `decisions`, made of them, in rounds until every limit has its verdict.

    Returns:
        How many answers, in the order of asking, made the verdict if there is one limit, on all questions: a round
        may have asked for more, whose share may be on the other side of the limit.
    """
    if decisions is None:
        answer(list(questions))
        return len(questions)
    decisions.ask(size, answer)
    return decisions.num_decisive
