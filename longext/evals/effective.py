"""The longest length at which retrieval reaches a bar: lengths are doubled, then the step that failed is halved.

Nothing says that accuracy falls with length. So doubling goes on until two lengths in a row have failed, and a pass
above a failure is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from longext.errors import ConfigError
from longext.evals.config import EffectiveConfig, NeedleConfig
from longext.evals.limits import verdict
from longext.evals.passkey import (
    PASSKEY_PROTOCOLS,
    accuracy_by_length,
    check_passkey_config,
    check_prompts,
    evaluate_passkey,
)
from longext.evals.perplexity import Progress
from longext.evals.ruler.needle import check_needle_config, evaluate_needles, make_questions
from longext.evals.statistics import wilson_interval
from longext.evals.suites.passkey import Passkey
from longext.manifest import result_record
from longext.models.chat import template_facts, uses_template
from longext.models.protocol import LanguageModel
from longext.registry import Registry

STEP = 64  # lengths are multiples of it
_FAILURES = 2  # in a row end the doubling
Measure = Callable[[int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class TriedLength:
    """One length and what was found there.

    Attributes:
        order: 1 for the first length tried.
        low, high: 95 % Wilson interval of `accuracy`.
        passed: `accuracy` is at or above the bar.
        clearly: `low` is, too.
        seconds: wall time.
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
    seconds: float


def search_lengths(measure: Measure, *, minimum: int, maximum: int, bar: float) -> list[TriedLength]:
    """Return every length tried, shortest first.

    From `minimum` lengths double up to `maximum`, or until two in a row are below the bar. Then the gap above the
    longest length that passed is halved until it is one step.

    Args:
        measure: length -> (right answers, prompts).
        minimum, maximum: multiples of `STEP`.
    """
    tried: dict[int, TriedLength] = {}

    def passes(length: int) -> bool:
        started = time.perf_counter()
        correct, trials = measure(length)
        low, high = wilson_interval(correct, trials)
        tried[length] = TriedLength(
            order=len(tried) + 1,
            length=length,
            num_correct=correct,
            num_trials=trials,
            accuracy=correct / trials,
            low=low,
            high=high,
            passed=correct / trials >= bar,
            clearly=low >= bar,
            seconds=time.perf_counter() - started,
        )
        return tried[length].passed

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


def longest(tried: Sequence[TriedLength], *, clearly: bool = False) -> int | None:
    """Return the longest length that passed (or whose whole interval did), None where none has."""
    return max((row.length for row in tried if (row.clearly if clearly else row.passed)), default=None)


def longest_unbroken(tried: Sequence[TriedLength]) -> int | None:
    """Return the longest length that passed with no failure at any shorter length tried."""
    found = None
    for row in sorted(tried, key=lambda own: own.length):
        if not row.passed:
            break
        found = row.length
    return found


# --- tests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthTest:
    """A test that can be run at one length.

    Attributes:
        summary, reference: for reports.
        check: raises where the config is wrong (model None), or where a prompt could not be built.
        run: (model, config, length, on_progress) -> (right answers, prompts).
    """

    summary: str
    reference: str
    check: Callable[[EffectiveConfig, LanguageModel | None], None]
    run: Callable[[LanguageModel, EffectiveConfig, int, Progress | None], tuple[int, int]]


def _shared(config: EffectiveConfig, kind: Any, *lengths: int, **more: Any) -> Any:
    names = {field.name for field in fields(kind)} - {"fail_under"}
    common = {key: value for key, value in vars(config).items() if key in names}
    return kind(**{**common, "lengths": tuple(dict.fromkeys(lengths)), **more})


def _check_passkey(config: EffectiveConfig, model: LanguageModel | None) -> None:
    asked = {
        "--chat-template": config.chat_template,
        "--template-arg": config.template_arg,
        "--neutralise-control-tokens": config.neutralise_control_tokens,
    }
    given = next((option for option, value in asked.items() if value), None)
    if given:
        raise ConfigError(f"{given} is for --test needle: the passkey prompt is a text that models continue.")
    settings = _shared(config, Passkey, config.min_length, config.max_length)
    check_passkey_config(settings)
    if model is not None:
        check_prompts(model, settings)


def _run_passkey(
    model: LanguageModel, config: EffectiveConfig, length: int, on_progress: Progress | None
) -> tuple[int, int]:
    cells = evaluate_passkey(model, _shared(config, Passkey, length), on_progress)
    pooled = accuracy_by_length(cells)[length]
    return pooled.num_correct, pooled.num_trials


def _needle_settings(config: EffectiveConfig, *lengths: int) -> NeedleConfig:
    settings: NeedleConfig = _shared(config, NeedleConfig, *lengths, tasks=("single",), scoring="exact")
    return settings


def _check_needle(config: EffectiveConfig, model: LanguageModel | None) -> None:
    check_needle_config(_needle_settings(config, config.min_length, config.max_length))
    if model is not None:
        make_questions(model, _needle_settings(config, config.min_length))


def _run_needle(
    model: LanguageModel, config: EffectiveConfig, length: int, on_progress: Progress | None
) -> tuple[int, int]:
    settings = _needle_settings(config, length)
    outcomes, _ = evaluate_needles(model, make_questions(model, settings), settings, None, on_progress)
    return sum(outcome.score == 1 for outcome in outcomes), len(outcomes)


LENGTH_TESTS: Registry[LengthTest] = Registry("test")
LENGTH_TESTS.register(
    "passkey",
    LengthTest(
        PASSKEY_PROTOCOLS["landmark"].summary,
        PASSKEY_PROTOCOLS["landmark"].reference,
        _check_passkey,
        _run_passkey,
    ),
)
LENGTH_TESTS.register(
    "needle",
    LengthTest(
        "RULER's single needle in a book, prompt and answer of exactly L tokens; greedy decoding gives the answer",
        "RULER, arXiv 2404.06654",
        _check_needle,
        _run_needle,
    ),
)


def check_effective_config(config: EffectiveConfig, model: LanguageModel | None = None) -> None:
    """Raise ConfigError for a value out of range; with a model, also where its prompts could not be built."""
    test = LENGTH_TESTS[config.test]
    if not 0 < config.bar <= 1:
        raise ConfigError(f"--bar must be a share above 0 and up to 1, for example 0.8, got {config.bar:g}.")
    for name in ("min_length", "max_length"):
        value = getattr(config, name)
        if value < STEP or value % STEP:
            near = max(STEP, round(value / STEP) * STEP)
            raise ConfigError(f"--{name.replace('_', '-')} must be a multiple of {STEP}, got {value}: try {near}.")
    if config.min_length > config.max_length:
        raise ConfigError(f"--min-length {config.min_length} is above --max-length {config.max_length}.")
    if config.fail_under is not None and not 1 <= config.fail_under <= config.max_length:
        raise ConfigError(
            f"--fail-under must be a length of 1 to {config.max_length} (--max-length), got {config.fail_under}."
        )
    if not config.depths:
        raise ConfigError("--depths needs at least one depth, for example 0,0.5,1.")
    test.check(config, model)


def num_prompts(config: EffectiveConfig) -> int:
    """Return how many prompts are run at a length."""
    return len(config.depths) * config.num_trials


def effective_notes(tried: Sequence[TriedLength], config: EffectiveConfig) -> list[str]:
    """Return the finding in words, and what would make it another."""
    found, bar = longest(tried), f"{config.bar:.0%}"
    if found is None:
        notes = [f"No length tried reaches {bar}: not even {tried[0].length:,} tokens."]
    else:
        notes = [f"Effective length: {found:,} tokens, the longest tried with an accuracy of at least {bar}."]
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
            notes.append(f"Its interval reaches below the bar (more --num-trials narrow it); {until}.")
    if tried[-1].length < config.max_length:
        notes.append(f"Lengths above {tried[-1].length:,} were not tried: {_FAILURES} in a row had failed.")
    return notes


def _verdicts(tried: Sequence[TriedLength], config: EffectiveConfig) -> list[dict[str, Any]]:
    """Return the bar of --fail-under; a length of 0 is one that nothing reached."""
    if config.fail_under is None:
        return []
    return [verdict("effective length", config.fail_under, longest(tried) or 0)]


def effective_record(model: LanguageModel, config: EffectiveConfig, tried: Sequence[TriedLength]) -> dict[str, Any]:
    """Return the JSON record of a search."""
    test = LENGTH_TESTS[config.test]
    is_chat = config.test == "needle" and uses_template(model, config.chat_template)
    return result_record(
        "effective-length",
        model.describe(),
        {
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
            "chat_template": is_chat,
            "seed": config.seed,
            **template_facts(model, is_chat),
        },
        None,
        effective_length=longest(tried),
        unbroken_length=longest_unbroken(tried),
        clear_length=longest(tried, clearly=True),
        notes=effective_notes(tried, config),
        bars=_verdicts(tried, config),
        results=[asdict(row) for row in tried],
    )
