"""Search the longest length at which retrieval works: every length tried with its interval, picture, JSON.

Lengths double until two in a row fail; then the gap above the longest that passed is halved down to 64 tokens.

Example: longext eval effective books-5m --method yarn --factor 8 --max-length 4096
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from longext.errors import ConfigError
from longext.evals.base import AnswersEval, Eval, GivenAnswers, Outcome, ReadingConfig, Work, register
from longext.evals.limits import PlaceLimit, verdict
from longext.evals.retrieval import QuestionScore, answer_files, begins_with, key_score
from longext.evals.sequential.asking import NOT_ASKED, Decisions, stopping_facts
from longext.evals.suites.needle import Needle
from longext.evals.suites.passkey import PASSKEY_PROTOCOLS, Passkey
from longext.evals.views import ANY, NEVER, ONE, PROMPT, Bars, Detail, Lines, Section, either
from longext.manifest import result_record
from longext.options import ChatConfig
from longext.registry import Registry
from longext.settings import LENGTH, option, override, shared_settings

STEP = 64  # lengths are multiples of it
_FAILURES = 2  # in a row end the doubling: nothing says that accuracy falls with length
Measure = Callable[[int], Sequence[bool]]
Bounds = Callable[[Sequence[bool]], tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class TriedLength:
    """One length and what was found there.

    Attributes:
        order: 1 for the first length tried.
        low, high: 95 % interval of `accuracy`: Wilson's; with an error rate, what all prompts would give.
        passed: `accuracy` is at or above the limit.
        clearly: `low` is, too.
        seconds: wall time; None if answers are given.
    """

    order: int
    length: int
    num_correct: int
    num_trials: int
    accuracy: float
    low: float
    high: float
    passed: bool
    clearly: bool
    seconds: float | None = None

    @staticmethod
    def of(order: int, length: int, right: Sequence[bool], limit: float, bounds: Bounds) -> TriedLength:
        """Return what answers at a length say of it; see `search_lengths`."""
        accuracy, (low, high) = sum(right) / len(right), bounds(right)
        return TriedLength(
            order=order,
            length=length,
            num_correct=sum(right),
            num_trials=len(right),
            accuracy=accuracy,
            low=low,
            high=high,
            passed=accuracy >= limit,
            clearly=low >= limit,
        )


def _wilson(right: Sequence[bool]) -> tuple[float, float]:
    from longext.evals.statistics import wilson_interval

    return wilson_interval(sum(right), len(right))


def search_lengths(
    measure: Measure, *, minimum: int, maximum: int, limit: float, bounds: Bounds = _wilson
) -> list[TriedLength]:
    """Return every length tried, shortest first.

    From `minimum` lengths double up to `maximum`, or until two in a row are below the limit. Then the gap above the
    longest length that passed is halved until it is one step.

    Args:
        measure: length -> whether each prompt was answered right; if it stopped early, with their share on the side
            of the limit that was decided.
        minimum, maximum: multiples of `STEP`.
        bounds: what `measure` returned -> interval of the accuracy.
    """
    tried: dict[int, TriedLength] = {}

    def passes(length: int) -> bool:
        started = time.perf_counter()
        row = TriedLength.of(len(tried) + 1, length, measure(length), limit, bounds)
        tried[length] = replace(row, seconds=time.perf_counter() - started)
        return row.passed

    length, failures = minimum, 0 if passes(minimum) else 1
    while length < maximum and failures < _FAILURES:
        length = min(2 * length, maximum)
        failures = 0 if passes(length) else failures + 1
    low = max((row.length for row in tried.values() if row.passed), default=None)
    if low is not None and low < length:
        high = min(row.length for row in tried.values() if row.length > low)
        while high - low > STEP:
            middle = (low + high) // 2 // STEP * STEP
            low, high = (middle, high) if passes(middle) else (low, middle)
    return [tried[length] for length in sorted(tried)]


def most_lengths(minimum: int, maximum: int) -> int:
    """Return how many lengths a search tries at most."""
    doublings = math.ceil(math.log2(maximum / minimum))
    return 1 + doublings + (math.ceil(math.log2(maximum / STEP)) if doublings else 0)


def longest_search(minimum: int, maximum: int) -> list[int]:
    """Return the lengths of the search that reads most: everything passes below one of the doubled lengths."""

    def tried(end: int) -> list[int]:
        rows = search_lengths(lambda length: [length < end], minimum=minimum, maximum=maximum, limit=1)
        return [row.length for row in rows]

    return max(map(tried, tried(maximum + 1)), key=sum)


def longest(tried: Sequence[TriedLength], *, clearly: bool = False) -> int | None:
    """Return the longest length that passed (or whose whole interval did), None if none has."""
    return max((row.length for row in tried if (row.clearly if clearly else row.passed)), default=None)


def longest_unbroken(tried: Sequence[TriedLength]) -> int | None:
    """Return the longest length that passed with no failure at any shorter length tried."""
    length = None
    for row in sorted(tried, key=lambda row: row.length):
        if not row.passed:
            break
        length = row.length
    return length


# --- tests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthTest:
    """A test that can be run at one length.

    Attributes:
        summary, reference: for reports.
        kind: the evaluation, with `prompt_ids` and `answer_lines`; options of the same name are those of the search.
        fixed: its other options.
    """

    summary: str
    reference: str
    kind: type[Eval]
    fixed: Mapping[str, Any] = field(default_factory=dict)


LENGTH_TESTS: Registry[LengthTest] = Registry("test")
_LANDMARK = PASSKEY_PROTOCOLS["landmark"]
LENGTH_TESTS.register("passkey", LengthTest(_LANDMARK.summary, _LANDMARK.reference, Passkey))
LENGTH_TESTS.register(
    "needle",
    LengthTest(
        "RULER's single needle in a book, prompt and answer of exactly L tokens; greedy decoding gives the answer",
        "RULER, arXiv 2404.06654",
        Needle,
        {"tasks": ("single",), "scoring": "exact"},
    ),
)
_CHAT_FLAGS = ("chat_template", "template_arg", "neutralise_control_tokens")


@register("effective")
@dataclass(frozen=True, kw_only=True)
class Effective(ReadingConfig, ChatConfig, AnswersEval):
    """The longest length at which retrieval reaches a limit: lengths double, then the step that failed is halved."""

    kind: ClassVar[str] = "effective-length"
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="effective-length",
            title="Effective length",
            picture="effective",
            views=(
                Bars(
                    "Longest length above the bar, tokens",
                    of=ANY,
                    unit="count",
                    columns=lambda score: score.keys[-1].removesuffix("_length"),
                    picture=NEVER,
                ),
                Lines(
                    "Accuracy at the lengths tried",
                    of="results.accuracy",
                    name="tried",
                    axis=PROMPT,
                    table=ONE,
                    details=(
                        Detail("limit", "passed", either("pass", "fail")),
                        Detail("interval above", "clearly", either("yes", "no")),
                        Detail("right", "num_correct"),
                        Detail("of", "num_trials"),
                        Detail("tried as", "order"),
                    ),
                ),
            ),
        ),
    )

    max_length: int = option(help="Longest length to try, a multiple of 64.", ge=2, le=LENGTH)
    min_length: int = option(128, "First length to try, a multiple of 64.")
    bar: float = option(0.8, "Accuracy that counts as passed, 0 to 1.")
    test: str = option(
        "passkey", "The landmark passkey, or RULER's single needle with exact scoring:", names=lambda: LENGTH_TESTS
    )
    depths: tuple[float, ...] = override(Passkey, "depths")
    num_trials: int = override(Passkey, "num_trials")
    fail_under: int | None = option(None, "LENGTH: exit with 1 if no length from it on passed.", panel="Output")
    error_rate: float | None = option(
        None,
        "Stop asking at a length once it passes or fails for certain: the effective length is wrong with at most this "
        "probability (0.05: 95 % certain; 0: no answer left can change it).",
        ge=0,
        le=0.5,
    )
    # no answer is read as text here, so it is no flag; recipes may have the key
    strip_thinking: bool | None = override(ChatConfig, "strip_thinking", is_flag=False)

    @classmethod
    def implied_defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return no bound of lengths if answers are given."""
        found = super().implied_defaults(values)
        return {**found, "max_length": LENGTH} if values.get("predictions") else found

    def task_at(self, *lengths: int) -> Any:
        """Return the evaluation that is run at some lengths."""
        test = LENGTH_TESTS[self.test]
        shared = shared_settings(self, test.kind, ("fail_under", "error_rate", "predictions"))
        return test.kind(**{**shared, "lengths": tuple(dict.fromkeys(lengths)), **test.fixed})

    def check(self) -> None:
        """Raise ConfigError for a length or limit out of range."""
        kind = LENGTH_TESTS[self.test].kind
        given = next((name for name in _CHAT_FLAGS if getattr(self, name)), None)
        if given and not issubclass(kind, ChatConfig):
            flag = f"--{given.replace('_', '-')}"
            raise ConfigError(f"{flag} is for --test needle: the {self.test} prompt is a text that models continue.")
        if not 0 < self.bar <= 1:
            raise ConfigError(f"--bar must be a share above 0 and up to 1, for example 0.8, got {self.bar:g}.")
        if self.predictions is not None:
            if self.error_rate is not None:
                raise ConfigError(NOT_ASKED)
            return
        for name in ("min_length", "max_length"):
            value = getattr(self, name)
            if value < STEP or value % STEP:
                near = max(STEP, round(value / STEP) * STEP)
                raise ConfigError(f"--{name.replace('_', '-')} must be a multiple of {STEP}, got {value}: try {near}.")
        if self.min_length > self.max_length:
            raise ConfigError(f"--min-length {self.min_length} is above --max-length {self.max_length}.")
        if self.fail_under is not None and not 1 <= self.fail_under <= self.max_length:
            raise ConfigError(
                f"--fail-under must be a length of 1 to {self.max_length} (--max-length), got {self.fail_under}."
            )
        if not self.depths:
            raise ConfigError("--depths needs at least one depth, for example 0,0.5,1.")
        self.task_at(self.min_length, self.max_length).check()

    def decide(self, prompts: Sequence[Any]) -> Decisions:
        """Return what says when enough prompts of a length were asked; all lengths share the error rate."""
        assert self.error_rate is not None
        error = self.error_rate / most_lengths(self.min_length, self.max_length)
        limit = PlaceLimit("bar", None, None, self.bar)
        return Decisions([limit], prompts, error=error, seed=self.seed, grain=1)

    def given_score(self, where: str, row: Any) -> QuestionScore:
        """Return the score of a line of answers.jsonl: 1 if the answer begins with what is expected."""
        return key_score(lambda task, expected, answer: begins_with(answer, expected[0]), where, row)

    def measure(self, model: Any, data: Any, work: Work) -> Outcome:
        """Return the record of the search, or of the lengths that answers are given of."""
        from longext.evals.sequential.means import planned_interval
        from longext.models.chat import template_facts, uses_template

        if isinstance(data, GivenAnswers):
            return self._outcome_of(data)
        work.expect_at_most(
            model,
            (
                self.task_at(length).prompt_ids(model)
                for length in reversed(longest_search(self.min_length, self.max_length))
            ),
        )
        num_prompts = len(self.depths) * self.num_trials
        decide = None if self.error_rate is None else self.decide
        lines: list[dict[str, Any]] = []

        def measure(length: int) -> Sequence[bool]:
            with work.progress(f"{self.test} at {length:,}", num_prompts, "prompts") as advance:
                own = self.task_at(length).answer_lines(model, advance, decide)
            lines.extend(own)
            return [line["score"] == 1 for line in own]

        bounds = partial(planned_interval, total=num_prompts) if decide else _wilson
        tried = search_lengths(measure, minimum=self.min_length, maximum=self.max_length, limit=self.bar, bounds=bounds)
        is_chat = self.test == "needle" and uses_template(model, self.chat_template)
        chat = {"chat_template": is_chat, "seed": self.seed, **template_facts(model, is_chat)}
        record = effective_record(self, tried, chat, model=model.describe())
        return Outcome(record=record, notes=record["notes"], files=answer_files(lines))

    def _outcome_of(self, given: GivenAnswers) -> Outcome:
        """Return the record of answers at the lengths of a file, in its order; it says what was asked there."""
        right: dict[int, list[bool]] = {}
        for row in given.scores:
            right.setdefault(row.length, []).append(row.score == 1)
        tried = [TriedLength.of(i, length, own, self.bar, _wilson) for i, (length, own) in enumerate(right.items(), 1)]
        asked = replace(
            self,
            min_length=min(right),
            max_length=max(right) if self.max_length == LENGTH else max(*right, self.max_length),
            depths=tuple(sorted({row.depth for row in given.scores if row.depth is not None})),
            num_trials=max(Counter((row.length, row.depth) for row in given.scores).values()),
        )
        tried.sort(key=lambda row: row.length)
        record = effective_record(asked, tried, {"chat_template": None, "seed": self.seed}, **self.given_facts(given))
        return Outcome(record=record, notes=record["notes"])

    def verdicts(self, limits: Sequence[Any], outcome: Outcome) -> list[dict[str, Any]]:
        """Return the limit of --fail-under; a length of 0 is one that nothing reached."""
        if self.fail_under is None:
            return []
        return [verdict("effective length", self.fail_under, outcome.record["effective_length"] or 0)]


def effective_notes(tried: Sequence[TriedLength], config: Effective) -> list[str]:
    """Return the finding in words, and what would make it another."""
    found, limit = longest(tried), f"{config.bar:.0%}"
    if found is None:
        notes = [f"No length tried reaches {limit}: not even {tried[0].length:,} tokens."]
    else:
        notes = [f"Effective length: {found:,} tokens, the longest tried with an accuracy of at least {limit}."]
        if found == config.max_length:
            notes.append("It is the longest length asked for (--max-length): the model may reach further.")
        unbroken, failed = longest_unbroken(tried), [row for row in tried if not row.passed and row.length < found]
        if failed:
            lengths = ", ".join(f"{row.length:,}" for row in failed)
            before = f"up to {unbroken:,}" if unbroken else "at no length"
            notes.append(f"Accuracy is not monotone: {lengths} failed below it. Without a failure it passes {before}.")
        if not next(row for row in tried if row.length == found).clearly:
            clear = longest(tried, clearly=True)
            until = (
                f"the longest length whose interval does not: {clear:,}" if clear else "so does that of every length"
            )
            narrows = "more --num-trials narrow it" if config.error_rate is None else "a lower --error-rate narrows it"
            notes.append(f"Its interval reaches below the bar ({narrows}); {until}.")
    if tried[-1].length < config.max_length:
        notes.append(f"Lengths above {tried[-1].length:,} were not tried: {_FAILURES} in a row had failed.")
    return notes


def effective_record(
    config: Effective, tried: Sequence[TriedLength], asking: Mapping[str, Any], **facts: Any
) -> dict[str, Any]:
    """Return the JSON record of a search.

    Args:
        asking: how the model was asked, for the protocol.
        facts: `model`, and `data` if answers are given.
    """
    test = LENGTH_TESTS[config.test]
    return result_record(
        Effective.kind,
        protocol={
            "id": f"effective/{config.test}",
            "definition": f"longest multiple of {STEP} tokens tried whose accuracy is at or above the bar; lengths "
            "double until two in a row fail, then the gap above the longest that passed is halved",
            "test": test.summary,
            "reference": test.reference,
            "bar": config.bar,
            "min_length": config.min_length,
            "max_length": config.max_length,
            "depths": list(config.depths),
            "num_trials": config.num_trials,
            **stopping_facts(config.error_rate),
            **asking,
        },
        **facts,
        effective_length=longest(tried),
        unbroken_length=longest_unbroken(tried),
        clear_length=longest(tried, clearly=True),
        notes=effective_notes(tried, config),
        results=[asdict(row) for row in tried],
    )
