"""What an evaluation is: one dataclass whose fields are its options, with what it measures and how that is shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from longext.data.json_lines import rows_of
from longext.errors import ConfigError, DataError
from longext.evals.limits import FAIL_UNDER, PLACES, SHARE, PlaceLimit, place_verdicts, require_limits
from longext.evals.views import Section
from longext.options import ChatConfig, EndpointConfig, RuntimeConfig, SharedConfig
from longext.registry import Registry, did_you_mean
from longext.settings import MANY, build_config, option, shown_name

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel

_ORDER = (
    "ppl longppl short passkey effective needle ruler nolit mrcr graphwalks longeval babilong longbench longbench2 "
    "infinitebench harness reconstruction efficiency"
).split()
EVALS: Registry[type[Eval]] = Registry("evaluation", "longext.evals.suites", _ORDER)
EvalT = TypeVar("EvalT", bound="Eval")
_PLACES = (("tasks", "task"), ("lengths", "length"), ("sizes", "length"), ("depths", "depth"))  # setting, of a score
_ANSWER_FILES = (".jsonl", ".txt")  # what a name of results leaves out


@dataclass(frozen=True, kw_only=True)
class GivenAnswers:
    """Answers of a file, scored.

    Attributes:
        facts: what else the record says of them.
        notes: what a reader of the scores has to know.
    """

    scores: Sequence[Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Advance(Protocol):
    """Say that `amount` more is done; `note` is shown behind it."""

    def __call__(self, amount: int, note: str = "") -> None: ...


class Progress(Protocol):
    """Open a progress display of `total` units."""

    def __call__(self, what: str, total: int, unit: str) -> contextlib.AbstractContextManager[Advance]: ...


def silent(amount: int, note: str = "") -> None:
    """Show nothing: an `Advance`."""


@contextlib.contextmanager
def no_progress(what: str, total: int, unit: str) -> Iterator[Advance]:
    """Yield an `Advance` that shows nothing."""
    yield silent


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run gives to `Eval.measure`.

    Attributes:
        progress: opens a progress display.
        answers: where answers are kept until the results are written, so that an interrupted run goes on from them;
            None if nothing is kept.
        expect: told (model, prompts in tokens, new tokens at most, whether prefixes are shared) of what is done next,
            for the cost of the run.
        expect_at_most: told (model, prompts of each part), where nothing is written, and it may turn out to be less.
    """

    progress: Progress = no_progress
    answers: Path | None = None
    expect: Callable[..., None] = lambda model, prompts, num_new, shares=True: None
    expect_at_most: Callable[..., None] = lambda model, parts: None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `Eval.measure` found.

    Attributes:
        record: the JSON record (`result_record`), without its verdicts.
        score_at: the score of (task, length), None for all of them: what `--fail-under` is compared with.
        notes: what a reader of the numbers has to know.
        files: further files of the results by name: their text, or a call that makes it.
        bars: the verdicts on the limits, if the run itself came to them (--error-rate).
    """

    record: dict[str, Any]
    score_at: Callable[[str | None, str | None], float | None] = lambda task, length: None
    notes: Sequence[str] = ()
    files: Mapping[str, str | Callable[[], str]] = field(default_factory=dict)
    bars: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Eval(SharedConfig, RuntimeConfig):
    """One evaluation: a subclass in a file of `evals/suites/`, whose fields (`option`) are flags and recipe keys.

    From the class follow the command `longext eval NAME`, its help and bounds, its table, picture and section of a
    report, `--json`, `--fail-under`, resuming from kept answers, and the row in the docs.

    Attributes:
        name: of the command; set by `register`.
        kind: of the record.
        sections: what a report shows of its records, the first for a record that no other claims.
        limit_option: what is not reached ends the command with exit code 1; "" if it has no limits.
        limits_are_most: the limits are upper ones.
        memory_defaults: of settings that the user left open, if a `memory` is read.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    sections: ClassVar[tuple[Section, ...]] = ()
    limit_option: ClassVar[str] = FAIL_UNDER
    limits_are_most: ClassVar[bool] = False
    memory_defaults: ClassVar[Mapping[str, Any]] = {}

    price_per_hour: float | None = option(
        None, "USD for an hour of this device, for the cost that is told before.", ge=0, panel="Running"
    )

    @classmethod
    def implied_defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults that depend on what was set: with a `memory`, the model and segment of its compressor."""
        if values.get("predictions"):
            return {"model": ""}
        if not values.get("memory"):
            return {}
        from longext.compressor.reading.readers import memory_defaults

        return {**cls.memory_defaults, **memory_defaults(str(values["memory"]))}

    @property
    def title(self) -> str:
        """Return what is measured, for titles: the model, the method applied to it, the memory it reads with."""
        given: Any = self
        factor = f" {given.factor:g}x" if getattr(self, "factor", None) else ""
        method = f" + {given.method}{factor}" if getattr(self, "method", None) else ""
        memory = f" + {Path(given.memory).name}" if getattr(self, "memory", None) else ""
        return f"{shown_name(self.model)}{method}{memory}"

    @property
    def label(self) -> str:
        """Return what the results directory is named after: the evaluation, and its protocol if it has several."""
        return self.name

    @property
    def subject(self) -> str | None:
        """Return what else it is named after: the model, or the answers that are scored."""
        return self.model or None

    def check(self) -> None:
        """Raise ConfigError for settings that cannot be measured; reads nothing."""

    def load_data(self) -> Any:
        """Return the documents or rows, read before the model is loaded."""

    def limits(self, data: Any) -> Sequence[PlaceLimit]:
        """Return the limits of `limit_option`, checked against what will be measured."""
        return ()

    def open_model(self) -> LanguageModel | None:
        """Return the model to measure; None if answers are given."""
        from longext.evals.models import open_model

        return open_model(self)

    def answers_path(self, output: Path) -> Path | None:
        """Return where answers are kept until `output` is written; None if none are."""
        return None

    def measure(self, model: Any, data: Any, work: Work) -> Outcome:
        """Return the record of the evaluation of `model` on `data`."""
        raise NotImplementedError

    def verdicts(self, limits: Sequence[Any], outcome: Outcome) -> list[dict[str, Any]]:
        """Return what the record says of each limit."""
        if outcome.bars is not None:
            return outcome.bars
        return place_verdicts(limits, outcome.score_at, at_most=self.limits_are_most)

    def require(self, record: Mapping[str, Any]) -> None:
        """Raise LongextError, which ends the command with exit code 1, if a limit was missed."""
        if self.limit_option:
            require_limits(record, self.limit_option)


@dataclass(frozen=True, kw_only=True)
class AnswersEval(Eval):
    """An evaluation that scores answers of a file as it scores a model's: `load_data` returns them in place of data."""

    predictions: str | None = option(
        None, "Score this file of answers (answers.jsonl of a run, or the authors'); no model is run.", panel="Output"
    )

    @property
    def subject(self) -> str:
        """Return the model, or the file of answers."""
        path = Path(str(self.predictions))
        return self.model or (path.stem if path.suffix in _ANSWER_FILES else path.name)

    def open_model(self) -> Any:
        """Return the model, None if answers are given."""
        return None if self.predictions is not None else super().open_model()

    def load_data(self) -> Any:
        """Return what questions are made of, or the scores of --predictions at the places that settings name."""
        if self.predictions is None:
            return self.read_data()
        given = self.read_answers(Path(self.predictions).expanduser())
        return self._at_named_places(given) if isinstance(given, GivenAnswers) else given

    def _at_named_places(self, given: GivenAnswers) -> GivenAnswers:
        """Return the scores at the tasks, lengths and depths of settings; one at its default names none.

        Raises:
            DataError: there are none.
        """
        defaults, spell = {each.name: each.default for each in fields(self)}, getattr(self, "spell", str)
        scores, named = given.scores, list[str]()
        for name, place in _PLACES:
            wanted: Sequence[Any] = getattr(self, name, ())
            if wanted != defaults.get(name, ()):
                named.append(f"--{name} {','.join(map(str, wanted))}")
                found = ((each, getattr(each, place, None)) for each in scores)
                scores = [each for each, at in found if at is None or at in wanted or spell(at) in wanted]
        if not scores:
            raise DataError(f"{self.predictions} has no answer of {' '.join(named)}.")
        return replace(given, scores=scores)

    def read_data(self) -> Any:
        """Return what questions are made of."""
        return None

    def read_answers(self, path: Path) -> GivenAnswers:
        """Return the answers of a file, scored: by default `given_score` of each of its JSON lines.

        Raises:
            ConfigError, DataError: no such file, or a line of another form or with the id of an earlier one.
        """
        ids = set[str]()

        def score(where: str, row: Any) -> Any:
            name = row.get("id") if isinstance(row, dict) else None
            if isinstance(name, str):
                if name in ids:
                    raise DataError(f"{where} has the id '{name}' of an earlier line: give each answer once.")
                ids.add(name)
            return self.given_score(where, row)

        return GivenAnswers(scores=rows_of(path, score, "a file of answers", option="--predictions", kind="answer"))

    def given_score(self, where: str, row: Any) -> Any:
        """Return the score of one line of a file of answers."""
        raise NotImplementedError

    @property
    def given_model(self) -> dict[str, Any]:
        """Return what the record says of the model if answers are given."""
        return {"id": self.model or None, "answers_from": self.predictions}

    def given_facts(self, data: GivenAnswers) -> dict[str, Any]:
        """Return what the record says of model and data if answers are given."""
        facts = {"data": self.predictions, "num_cases": len(data.scores), "sha256": None}
        return {"model": self.given_model, "data": facts}


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(EndpointConfig, RuntimeConfig):
    """What is applied to a model before it is evaluated, and how it reads: a method in memory, a memory by segments."""

    method: str | None = option(
        None, "Apply this extension method in memory first; parameters as name:key=value.", panel="Method"
    )
    factor: float | None = option(None, "Factor of --method: target length / trained length.", le=MANY, panel="Method")
    memory: str | None = option(
        None,
        "Read by segments with this memory: none, window[:N], streaming:4+N, transformer-xl:N, thinned:R, a KV policy "
        "(snapkv:N, snapkv:8x, keydiff:N+M with the M newest), or a trained compressor OUT[@ratio[+overlap]] (MODEL "
        "may then be left out).",
        panel="Method",
    )
    segment: int = option(128, "Tokens of a segment (--memory; compressors: their own).", ge=1, panel="Method")
    batch_tokens: int | None = option(
        None, "Tokens per forward pass (default: one window on a CPU, 32768 on a GPU).", ge=1, panel="Running"
    )


@dataclass(frozen=True, kw_only=True)
class QuestionEval(ReadingConfig, ChatConfig, Eval):
    """An evaluation that asks questions and reads the answers; these are kept until the results are written."""

    def answers_path(self, output: Path) -> Path | None:
        """Return where answers are kept."""
        return output.with_name(f"{output.name}.predictions.jsonl")


def register(name: str) -> Callable[[type[EvalT]], type[EvalT]]:
    """Return a class decorator that adds an evaluation as `longext eval NAME`."""

    def add(kind: type[EvalT]) -> type[EvalT]:
        kind.name = name
        text = sys.modules[kind.__module__].__doc__ or kind.__doc__ or ""
        EVALS.register(name, kind, text.strip().partition("\n")[0].rstrip("."))
        return kind

    return add


def fail_under(form: str = PLACES) -> Any:
    """Return the field of --fail-under for shares, which are given in a `form`."""
    text = f"{form}, {SHARE.words}: exit with 1 below it; may be repeated."
    return option((), text, repeats=True, panel="Output")


def check_tasks(tasks: Sequence[str], table: Registry[Any]) -> None:
    """Raise ConfigError unless `tasks` are different entries of `table`, at least one."""
    for task in tasks:
        table[task]
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"--tasks must name different tasks, got {','.join(tasks) or 'none'}.")


def find_eval(name: str) -> type[Eval]:
    """Return the evaluation called `name`, or whose records are of that kind ("perplexity" for "ppl").

    Raises:
        ConfigError: there is none; names the nearest one.
    """
    if name in EVALS:
        return EVALS[name]
    kinds = {kind.kind: kind for kind in EVALS.values()}
    if name in kinds:
        return kinds[name]
    raise ConfigError(f"Unknown evaluation '{name}'. {did_you_mean(name, {*EVALS, *kinds})}")


def make_eval(name: str, model: str, **settings: Any) -> Eval:
    """Return the evaluation called `name` with its settings, checked as those of a recipe are."""
    return build_config(find_eval(name), None, [], {"model": model, **settings})
