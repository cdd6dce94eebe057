"""`longext gate`: accuracy and perplexity against limits, each measured until its verdict is certain."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.checkpoint.source import resolve_model
from longext.data.documents import data_hash
from longext.errors import ConfigError, DataError, LongextError
from longext.evals.base import Progress
from longext.evals.limits import check_lengths, perplexity_limits, place_limits
from longext.evals.models import open_model
from longext.evals.perplexity import TokenizedDocument, tokenize_documents
from longext.evals.runner import run_eval
from longext.evals.sequential.asking import STOPPING
from longext.evals.sequential.means import LOOKS, LookTest
from longext.evals.suites.effective import LENGTH_TESTS
from longext.evals.suites.passkey import Passkey
from longext.evals.suites.ppl import Perplexity, Window
from longext.evals.suites.ruler import Ruler
from longext.manifest import result_record
from longext.models.methods import check_method
from longext.registry import did_you_mean
from longext.report.outcome import Tables
from longext.report.tables import Table, number
from longext.settings import shared_settings

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel
    from longext.report.config import GateConfig

_NEEDLE = LENGTH_TESTS["needle"]
_TESTS: dict[str, tuple[Any, Mapping[str, Any], int]] = {  # evaluation, options, prompts of a trial and length
    "passkey": (Passkey, {}, 5),
    "needle": (_NEEDLE.kind, _NEEDLE.fixed, 1),
    "ruler": (Ruler, {}, 13),
}
_OWN = frozenset({"lengths", "fail_under", "fail_over", "error_rate", "output", "force", "tasks", "num_trials", "data"})
_ACCURACY = 0.8
_WINDOWS = (
    "windows of L tokens of the documents, by the seed; the last tokens of each are scored, as `eval ppl --protocol "
    "sliding` scores all but the first; the mean difference to the limit is looked at after "
    f"{', '.join(map(str, LOOKS))} windows and after all of them (Student's t, the error divided by the looks)"
)


def run_gate(config: GateConfig, progress: Progress) -> dict[str, Any]:
    """Return the record of a gate: every check with its verdict, and whether all passed.

    Raises:
        ConfigError, CheckpointError, DataError: something given cannot be used.
    """
    from longext.threads import set_threads

    started = time.perf_counter()
    tests, windows = _tests(config), _limits_of_text(config)
    parts = len(tests) + len(windows)
    if not parts:
        raise ConfigError("Nothing to check: give --tests, --fail-over LENGTH=PPL or --baseline.")
    error = config.error_rate / parts  # whatever fails wrongly fails the gate, so all share the errors
    set_threads(config.threads)
    texts = _Texts(config) if windows else None
    model = open_model(config)
    checks = []
    for name, task in tests.items():
        task = dataclasses.replace(task, error_rate=error)
        bars = run_eval(task, model, progress=progress).record["bars"]
        checks += [{"check": name, "length": int(bar["name"]), "unit": "prompts", **bar} for bar in bars]
    if texts:
        checks += texts.checks(model, windows, error, progress)
    facts = None if texts is None else texts.facts
    return result_record(
        "gate",
        model.describe(),
        {
            "id": "gate",
            "definition": "every check passes or fails as all planned prompts and windows would; each run's answer is "
            "another with at most the error rate",
            "error_rate": config.error_rate,
            "num_prompts": config.num_prompts,
            "num_windows": config.num_windows,
            "tests": {name: task.name for name, task in tests.items()},
            "stopping": STOPPING,
            **({"windows": _WINDOWS, "margin": config.margin, "baseline": config.baseline} if texts else {}),
            "seed": config.seed,
        },
        facts,
        passed=all(check["passed"] for check in checks),
        checks=checks,
        seconds=time.perf_counter() - started,
    )


def _tests(config: GateConfig) -> dict[str, Any]:
    """Return the evaluations of --tests with their limits, checked."""
    check_method(config.method, config.factor)
    names = () if config.tests == ("none",) else config.tests
    for name in names:
        if name not in _TESTS:
            raise ConfigError(f"Unknown test '{name}'. {did_you_mean(name, _TESTS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--tests names a test twice: {','.join(names)}.")
    check_lengths(config.lengths, minimum=64)
    places = [(name, str(length)) for name in names for length in sorted(config.lengths)]
    if config.fail_under and not names:
        raise ConfigError("--fail-under is the accuracy of --tests, and there are none.")
    limits = place_limits(config.fail_under, places)
    tests = {}
    for name in names:
        kind, fixed, size = _TESTS[name]
        least = {
            length: next(
                (
                    each.limit
                    for each in sorted(limits, key=lambda one: -(bool(one.task) + bool(one.length)))
                    if each.task in (None, name) and each.length in (None, str(length))
                ),
                _ACCURACY,
            )
            for length in sorted(config.lengths)
        }
        tests[name] = kind(
            **shared_settings(config, kind, _OWN),
            **fixed,
            lengths=config.lengths,
            num_trials=math.ceil(config.num_prompts / size),
            fail_under=tuple(f"{length}={limit}" for length, limit in least.items()),
            error_rate=config.error_rate,
        )
        tests[name].check()
    return tests


# --- perplexity -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _TextLimit:
    """What the perplexity at a length is held to: a number, or (None) another model on the same windows."""

    name: str
    length: int
    limit: float | None


def _limits_of_text(config: GateConfig) -> list[_TextLimit]:
    own = perplexity_limits(config.fail_over, config.lengths)
    limits = [_TextLimit("perplexity", int(each.length or 0), each.limit) for each in own]
    if config.baseline is None:
        return limits
    resolve_model(config.baseline)  # a wrong name is told before anything is measured
    return limits + [_TextLimit("baseline", length, None) for length in sorted(config.lengths)]


class _Texts:
    """The documents of a gate as windows."""

    def __init__(self, config: GateConfig) -> None:
        self._config = config
        shared = shared_settings(config, Perplexity, _OWN)
        self._task = Perplexity(**{**shared, "data": config.data}, lengths=config.lengths, protocol="sliding")
        self._task.check()
        self._documents = self._task.load_data()
        self._tokenized: Sequence[TokenizedDocument] = ()
        self._baseline: LanguageModel | None = None
        self.facts: dict[str, Any] = {
            "source": config.data,
            "sha256": data_hash(self._documents),
            "num_documents": len(self._documents),
        }

    def checks(
        self, model: LanguageModel, limits: Sequence[_TextLimit], error: float, progress: Progress
    ) -> list[dict[str, Any]]:
        """Return the verdict on each limit."""
        self._tokenized, short = tokenize_documents(model, self._documents, self._task)
        self.facts["num_too_short"] = short
        if any(each.limit is None for each in limits):
            self._baseline = self._open_baseline(model)
        return [self._check(model, each, error, progress) for each in limits]

    def _open_baseline(self, model: LanguageModel) -> LanguageModel:
        plain: dict[str, Any] = {"model": self._config.baseline, "revision": None}
        plain.update(method=None, factor=None, memory=None, endpoint=None)
        other = open_model(dataclasses.replace(self._config, **plain))
        text = self._documents[0].text[:10_000]
        if other.encode(text) != model.encode(text):
            raise ConfigError(f"--baseline {self._config.baseline} has another tokenizer: perplexities do not compare.")
        return other

    def _windows(self, length: int) -> list[Window]:
        totals = [len(document.input_ids) for document in self._tokenized]
        step = self._task.step
        windows = [each for each in self._task.rules.windows(totals, length, step) if each.first == length - step]
        if not windows:
            raise DataError(
                f"No document of {self._config.data} has {length + step} tokens, for a window of {length} behind other "
                "text. Give longer documents, or shorter --lengths."
            )
        chosen = random.Random(f"{self._config.seed} windows {length}").sample(windows, len(windows))
        return chosen[: self._config.num_windows]

    def _check(self, model: LanguageModel, limit: _TextLimit, error: float, progress: Progress) -> dict[str, Any]:
        windows = self._windows(limit.length)
        test = LookTest(len(windows), error, error)
        losses, others = [], []
        with progress(f"{limit.name} at {limit.length:,}", len(windows), "windows") as advance:
            for window in windows:
                losses.append(self._loss(model, window))
                if limit.limit is None:
                    assert self._baseline is not None
                    others.append(self._loss(self._baseline, window) + math.log1p(self._config.margin))
                else:
                    others.append(math.log(limit.limit))
                advance(1)
                if test.add(losses[-1] - others[-1]) is not None:
                    break
        value, held = (math.exp(sum(each) / len(each)) for each in (losses, others))
        low, high = test.interval(error)
        return {
            "check": limit.name,
            "length": limit.length,
            "unit": "windows",
            "name": str(limit.length),
            "rule": "at most",
            "limit": held if limit.limit is None else limit.limit,
            "value": value,
            "passed": bool(test.verdict),
            "low": held * math.exp(low),
            "high": held * math.exp(high),
            "num_asked": len(losses),
            "num_planned": len(windows),
        }

    def _loss(self, model: LanguageModel, window: Window) -> float:
        import torch

        ids = self._tokenized[window.document].input_ids[window.start : window.start + window.length]
        return float(model.score(torch.tensor([ids]), window.first).nll.double().mean())


# --- what is shown ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class Verdict:
    """What `longext gate` found; `record` is the JSON. It is true if every check passed."""

    record: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return bool(self.record["passed"])

    def __bool__(self) -> bool:
        return self.passed

    def require(self) -> None:
        """Raise LongextError that names every check that failed."""
        if not self.passed:
            raise LongextError(failure(self.record))

    def table(self) -> Tables:
        """Return the table of all checks; it prints as text, and as HTML in a notebook."""
        return Tables(gate_tables(self.record))

    def __repr__(self) -> str:
        return f"{headline(self.record)}\n{self.table()!r}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(headline(self.record))}</p>{self.table()._repr_html_()}"


def headline(record: Mapping[str, Any]) -> str:
    """Return the verdict in a sentence."""
    checks, error = record["checks"], record["protocol"]["error_rate"]
    failed = [check for check in checks if not check["passed"]]
    said = "PASS" if record["passed"] else "FAIL"
    names = f": {', '.join(_name(check) for check in failed)}" if failed else ""
    sure = f"{100 * (1 - error):.3g} % sure" if error else "certain"
    return f"{said}: {len(checks) - len(failed)} of {len(checks)} checks passed{names} ({sure})."


def _name(check: Mapping[str, Any]) -> str:
    return f"{check['check']} at {check['length']:,}"


def failure(record: Mapping[str, Any]) -> str:
    """Return what a failed gate ends with."""
    missed = [check for check in record["checks"] if not check["passed"]]
    spelled = (f"{_name(each)} is {_spell(each, 'value')} ({each['rule']} {_spell(each, 'limit')})" for each in missed)
    return f"The gate failed: {'; '.join(spelled)}."


def _spell(check: Mapping[str, Any], key: str) -> str:
    return f"{check[key]:.1%}" if check["unit"] == "prompts" else number(check[key])


def gate_tables(record: Mapping[str, Any]) -> list[Table]:
    """Return the table of all checks."""
    rows = [
        [
            check["check"],
            f"{check['length']:,}",
            "pass" if check["passed"] else "FAIL",
            _spell(check, "value"),
            f"{'>=' if check['rule'] == 'at least' else '<='} {_spell(check, 'limit')}",
            f"{_spell(check, 'low')} - {_spell(check, 'high')}",
            f"{check['num_asked']}/{check['num_planned']}",
        ]
        for check in record["checks"]
    ]
    columns = ["check", "length", "verdict", "value", "limit", "interval", "asked"]
    caption = "interval: of what all planned prompts or windows would give, where it stopped. asked: of those."
    return [Table("Gate", columns, rows, left=frozenset({2}), caption=caption)]


def summary_text(record: Mapping[str, Any], model: str) -> str:
    """Return the verdict and the table as Markdown."""
    tables = "\n".join(table.to_markdown() for table in gate_tables(record))
    return f"### longext gate: {model}\n\n{headline(record)}\n\n{tables}\n"


def append_summary(config: GateConfig, record: Mapping[str, Any]) -> Path | None:
    """Append the summary to --summary, or in GitHub Actions to the summary of the step; return where, None if nowhere.

    Raises:
        ConfigError: nothing can be written there.
    """
    named = config.summary or os.environ.get("GITHUB_STEP_SUMMARY")
    if not named:
        return None
    path = Path(named).expanduser()
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(summary_text(record, config.model))
    except OSError as error:
        raise ConfigError(f"--summary {path} cannot be written: {error.strerror}.") from error
    return path
