"""Evaluations whose answers are right, wrong or partly right: questions, scores, cells with intervals, the record.

An answer is generated and scored, or the right one is ranked among wrong ones by their likelihood, or both.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.data.json_lines import text_fields
from longext.errors import ConfigError, DataError
from longext.evals.base import Advance, AnswersEval, GivenAnswers, Outcome, QuestionEval, Work, fail_under, silent
from longext.evals.limits import PLACES, Place, PlaceLimit, place_limits
from longext.evals.models import told_positions
from longext.evals.ranks import DEFINITION, Choices, Rank, choices_of, grouped, rank_questions, ranked_tables
from longext.evals.sequential.asking import (
    Decisions,
    ask_questions,
    check_error_rate,
    error_rate,
    rounds_path,
    stopping_facts,
)
from longext.manifest import result_record
from longext.models.answer_file import tokens_hash
from longext.models.batching import batch_size
from longext.models.chat import asked_facts, chat_tokens, render_chat, user_text, uses_template, with_prefix
from longext.models.methods import check_method
from longext.registry import Registry
from longext.settings import option
from longext.untrusted import is_a

if TYPE_CHECKING:
    from longext.models.answers import Prediction
    from longext.models.protocol import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt, and how its answer is scored.

    Attributes:
        id: its name, unique among the questions of a run.
        task: its kind.
        length: what results are ordered by: tokens, lines, topics.
        depth: where the needle is, None if that is drawn.
        input_ids: the prompt.
        expected: the right answers.
        max_new_tokens, stop: where the answer ends at the latest.
        choices: right and wrong answers for likelihood; None if the question has none.
        asked: the question itself, if the score of an answer depends on it.
        is_cut: the prompt was too long and lost its middle.
        frame_ids: see `Request`.
    """

    id: str
    task: str
    length: int
    depth: float | None = None
    input_ids: tuple[int, ...]
    expected: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    choices: Choices | None = None
    asked: str = ""
    is_cut: bool = False
    frame_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionScore:
    """How one question was answered: its task, length and depth, the share that was right, the tokens of its prompt."""

    task: str
    length: int
    depth: float | None
    score: float
    num_tokens: int


@dataclass(kw_only=True)
class Answered:
    """Questions that were asked, with their scores, the answers by id, and the ranks of the right ones."""

    questions: Sequence[Any] = ()
    scores: list[QuestionScore] = field(default_factory=list)
    answers: dict[str, Prediction] = field(default_factory=dict)
    ranks: list[Rank] = field(default_factory=list)


_OF_ANSWERS = ("tasks", "lengths", "num_trials")  # what answers themselves say of how they were asked for
GENERATE, LIKELIHOOD, BOTH = "generate", "likelihood", "both"
ANSWERS: Registry[str] = Registry("way of answering")
ANSWERS.register(GENERATE, "answers are generated and scored")
ANSWERS.register(LIKELIHOOD, f"nothing is generated: {DEFINITION}")
ANSWERS.register(BOTH, f"answers are generated and scored; besides, {DEFINITION}")


def check_answers(task: Any) -> None:
    """Raise ConfigError for an unknown way of answering, and for one that goes with no given answers or error rate."""
    ANSWERS[task.answers]
    check_error_rate(task)
    if task.predictions is not None and task.answers != GENERATE:
        raise ConfigError("--predictions has answers that were generated: leave --answers out.")


@dataclass(frozen=True, kw_only=True)
class RetrievalEval(QuestionEval, AnswersEval):
    """An evaluation that asks questions with known answers: a subclass says which they are, and by what protocol.

    Attributes:
        unit: what progress counts.
        pools: further tables of the record: "by_task" (all depths), "by_length" (all tasks).
        limit_form: what --fail-under takes.
        has_shares: the score of an answer is the share of the expected ones that it holds.
    """

    unit: ClassVar[str] = "prompts"
    pools: ClassVar[tuple[str, ...]] = ()
    limit_form: ClassVar[str] = PLACES
    has_shares: ClassVar[bool] = True

    answers: str = option(
        GENERATE, "Answers are generated, the right one is ranked by likelihood, or", names=lambda: ANSWERS
    )
    fail_under: tuple[str, ...] = fail_under()
    error_rate: float | None = error_rate()

    def check(self) -> None:
        """Raise ConfigError for a method that cannot be applied, or answers that are given and ranked or limited."""
        check_method(self.method, self.factor)
        check_answers(self)
        if self.predictions is not None and getattr(self, "limit", None) is not None:
            raise ConfigError("--limit is of the rows that are asked, and --predictions has the answers: leave it out.")

    @property
    def generates(self) -> bool:
        """True if answers are generated."""
        return self.answers != LIKELIHOOD

    @property
    def ranks(self) -> bool:
        """True if the right answers are ranked among wrong ones."""
        return self.answers != GENERATE

    def answers_path(self, output: Path) -> Path | None:
        """Return where answers are kept, a folder if they are asked for in rounds; None if none are generated."""
        if not self.generates or self.predictions is not None:
            return None
        return super().answers_path(output) if self.error_rate is None else rounds_path(output)

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return the score of an answer, 0 to 1."""
        raise NotImplementedError

    def score(self, question: Any, answer: str) -> float:
        """Return the score of an answer to a question, 0 to 1."""
        return self.rate(question.task, question.expected, answer, question.asked)

    def given_score(self, where: str, row: Any) -> QuestionScore:
        """Return the score of one line of a file of answers."""
        return own_score(self.rate, where, row)

    def places(self, data: Any) -> list[Place]:
        """Return every task and length that is measured, lengths as users spell them."""
        own: Any = self
        return [(task, str(length)) for task in own.wanted for length in sorted(own.lengths)]

    @property
    def wanted(self) -> Sequence[str]:
        """Return the tasks that are asked for."""
        own: Any = self
        chosen: Sequence[str] = own.tasks
        return chosen

    def spell(self, length: int) -> str:
        """Return a length as users spell it."""
        return str(length)

    def questions(self, model: LanguageModel, data: Any) -> Sequence[Any]:
        """Return every `Question`."""
        raise NotImplementedError

    def protocol(self, model: Any) -> dict[str, Any]:
        """Return what the record says of the protocol, besides how the model was asked; no model: answers are given."""
        raise NotImplementedError

    def data_facts(self, data: Any) -> dict[str, Any] | None:
        """Return what the record says of the data."""
        return None

    def notes(self, model: LanguageModel, data: Any, scores: Sequence[Any]) -> list[str]:
        """Return what a reader of the scores has to know, besides what spoilt answers and prompts that are too long."""
        return []

    def uses_chat(self, model: LanguageModel) -> bool:
        """Return True if questions go through the tokenizer's chat template."""
        return uses_template(model, self.chat_template)

    def prompt_tokens(self, model: LanguageModel, text: str, opening: str = "") -> tuple[int, ...]:
        """Return a question as tokens: a message in the chat template, or without one the text and then `opening`."""
        text = user_text(model, text)
        return tuple(chat_tokens(model, text) if self.uses_chat(model) else model.encode(f"{text}{opening}"))

    def choices(
        self, model: LanguageModel, text: str, opening: str, right: Sequence[str], wrong: Sequence[str]
    ) -> Choices | None:
        """Return the candidates behind a question; None if nothing is ranked.

        Args:
            opening: the beginning of the answer, which also a chat model is given, behind the assistant's header.
        """
        if not self.ranks:
            return None
        encode = partial(model.encode, add_bos=False)
        return choices_of(encode, partial(opened_tokens, model, self.uses_chat(model), text), opening, right, wrong)

    def limits(self, data: Any) -> list[PlaceLimit]:
        """Return the limits of --fail-under."""
        given = data.scores if isinstance(data, GivenAnswers) else None
        places = self.places(data) if given is None else [(each.task, self.spell(each.length)) for each in given]
        return place_limits(self.fail_under, places, form=self.limit_form)

    def ask(
        self,
        model: LanguageModel,
        questions: Sequence[Any],
        path: Path | None = None,
        advance: Advance = silent,
    ) -> tuple[list[QuestionScore], dict[str, Prediction]]:
        """Return how each question was answered, and the answers by id.

        Args:
            path: file that keeps the answers of a run that is interrupted.
            advance: called with the number of questions just answered.
        """
        from longext.models.answers import Request, generate_predictions

        requests = [
            Request(each.id, each.input_ids, each.max_new_tokens, each.stop, frame_ids=each.frame_ids)
            for each in questions
        ]
        is_chat = self.uses_chat(model)
        predictions = generate_predictions(model, requests, path, advance, self.batch_tokens, is_chat=is_chat)
        answers = {prediction.id: prediction for prediction in predictions}
        return [score_of(each, self.score(each, answers[each.id].text)) for each in questions], answers

    def tables(self, scores: Sequence[QuestionScore]) -> dict[str, Any]:
        """Return the tables of a record: every task, length and depth under "results", and the pools."""
        pools = {name: cells_of(scores, by_task=name == "by_task", by_depth=False) for name in self.pools}
        return {"results": cells_of(scores), **pools}

    def measure(self, model: Any, data: Any, work: Work) -> Outcome:
        """Return the record: every question asked and scored, its right answers ranked, or answers scored."""
        if isinstance(data, GivenAnswers):
            return self._outcome_of(data)
        from longext.models.answers import answer_notes

        started = time.perf_counter()
        planned = self.questions(model, data)
        num_ranked = sum(each.choices is not None for each in planned) if self.ranks else 0
        if self.ranks and not num_ranked:
            raise ConfigError(
                f"--answers {self.answers} needs wrong answers, and no question here has any: leave it out."
            )
        decisions = None if self.error_rate is None else self._decisions(planned, data)
        self._expect(model, planned, work)
        with work.progress(self.name, len(planned) * self.generates + num_ranked, self.unit) as advance:
            asked = self._answered(model, planned, decisions, work.answers, advance)
        questions, scores, answers, ranks = asked.questions, asked.scores, asked.answers, asked.ranks
        seconds = time.perf_counter() - started
        notes = [decisions.note(self.unit)] if decisions else []
        if num_ranked < len(planned) and self.ranks:
            notes.append(f"{len(planned) - num_ranked} of {len(planned)} {self.unit} have no wrong answers to rank.")
        notes += [*self.notes(model, data, scores or ranks), *self.window_notes(model, scores or ranks)]
        notes += cut_note(questions)
        notes += answer_notes(answers.values()) if answers else []
        is_chat = self.uses_chat(model)
        record = result_record(
            self.kind,
            model.describe(),
            {
                **self.protocol(model),
                **({"answers": self.answers, "answers_definition": ANSWERS[self.answers]} if self.ranks else {}),
                **stopping_facts(self.error_rate),
                "chat_template": is_chat,
                **asked_facts(model, is_chat, (tokens_hash(each.input_ids) for each in questions)),
            },
            self.data_facts(data),
            seconds=seconds,
            **self.tables(scores),
            **(ranked_tables(ranks, self.pools) if ranks else {}),
            notes=notes,
        )
        pairs = zip(questions, scores, strict=True) if answers else ()
        lines = [_generated_line(question, score, answers[question.id]) for question, score in pairs]
        bars = decisions.rows() if decisions else None
        score_at = mean_at(scores or ranks, self.spell)
        return Outcome(record=record, score_at=score_at, notes=notes, files=answer_files(lines), bars=bars)

    def _round(self, model: LanguageModel, questions: Sequence[Any], path: Path | None, advance: Advance) -> Answered:
        """Return what was asked at once."""
        asked = Answered(questions=questions)
        if self.generates:
            asked.scores, asked.answers = self.ask(model, questions, path, advance)
        if self.ranks:
            asked.ranks = rank_questions(model, questions, advance)
        return asked

    def _decisions(self, questions: Sequence[Any], data: Any) -> Decisions:
        """Return what decides --fail-under; only questions with choices have ranks."""
        assert self.error_rate is not None
        is_exact = self.generates and self.has_shares
        return Decisions(
            self.limits(data),
            questions if self.generates else [each for each in questions if each.choices is not None],
            error=self.error_rate,
            seed=self.seed,
            spell=self.spell,
            grain=1 / math.lcm(*(len(each.expected) for each in questions)) if is_exact else 0,
        )

    def _answered(
        self,
        model: LanguageModel,
        planned: Sequence[Any],
        decisions: Decisions | None,
        path: Path | None,
        advance: Advance,
    ) -> Answered:
        """Return what was asked, in the order of `planned`: all of it, or until every limit had its verdict."""
        rounds: list[Answered] = []

        def answer(questions: list[Any]) -> list[float]:
            file = path if path is None or decisions is None else path / f"{len(rounds):05d}.jsonl"
            rounds.append(self._round(model, questions, file, advance))
            return [each.score for each in rounds[-1].scores or rounds[-1].ranks]

        longest = max((len(each.input_ids) + each.max_new_tokens for each in planned), default=0)
        ask_questions(decisions, planned, batch_size(self.batch_tokens, longest, model.device), answer)
        asked = {question.id for each in rounds for question in each.questions}
        scores = {q.id: score for each in rounds for q, score in zip(each.questions, each.scores, strict=False)}
        return Answered(
            questions=[each for each in planned if each.id in asked],
            scores=[scores[each.id] for each in planned if each.id in scores],
            answers={id: answer for each in rounds for id, answer in each.answers.items()},
            ranks=[rank for each in rounds for rank in each.ranks],
        )

    def num_new(self, question: Any) -> int:
        """Return the tokens that are written at most."""
        return int(question.max_new_tokens)

    def _expect(self, model: LanguageModel, questions: Sequence[Any], work: Work) -> None:
        if self.generates:
            work.expect(model, [each.input_ids for each in questions], sum(map(self.num_new, questions)))
        if self.ranks:
            work.expect(model, [each.choices.input_ids for each in questions if each.choices], 0)

    def _outcome_of(self, given: GivenAnswers) -> Outcome:
        protocol = self._asked_as(given.scores).protocol(None)
        notes = [*given.notes, *told_note(self, protocol)]
        record = result_record(
            self.kind,
            protocol={**protocol, "chat_template": None},
            **self.given_facts(given),
            **self.tables(given.scores),
            **given.facts,
            notes=notes,
        )
        return Outcome(record=record, score_at=mean_at(given.scores, self.spell), notes=notes)

    def _asked_as(self, scores: Sequence[QuestionScore]) -> Any:
        """Return it with the tasks, lengths and numbers of trials of answers."""
        trials = Counter((each.task, each.length, each.depth) for each in scores)
        found = {
            "tasks": tuple(dict.fromkeys(each.task for each in scores)),
            "lengths": tuple(sorted({each.length for each in scores})),
            "num_trials": max(trials.values()),
        }
        own: Any = self
        return replace(own, **{name: found[name] for name in _OF_ANSWERS if hasattr(own, name)})

    def window_notes(self, model: LanguageModel, scores: Sequence[Any]) -> list[str]:
        """Return a note if prompts are longer than the model has positions (and no memory reads them by segments)."""
        longest, window = max(each.num_tokens for each in scores), told_positions(model)
        if self.memory or longest <= window:
            return []
        over = sum(each.num_tokens > window for each in scores)
        return [f"{over} of {len(scores)} prompts are longer than the model's {window:,} positions, up to {longest:,}."]


def opened_tokens(model: LanguageModel, is_chat: bool, text: str, opening: str) -> tuple[int, ...]:
    """Return a question and the beginning of its answer as tokens, that behind the assistant's header of a template."""
    text = user_text(model, text)
    if not is_chat:
        return tuple(model.encode(f"{text}{opening}"))
    rendered = render_chat(model, [{"role": "user", "content": text}])
    return tuple(with_prefix(model, model.encode(f"{rendered}{opening}", add_bos=False)))


def cut_note(questions: Sequence[Any]) -> list[str]:
    """Return a note if prompts lost their middle."""
    cut = sum(each.is_cut for each in questions)
    return [f"{cut} of {len(questions)} prompts were too long and lost their middle (--max-length)."] if cut else []


def told_note(config: Any, protocol: Mapping[str, Any]) -> list[str]:
    """Return a note on what the record of given answers says by the settings of the command alone."""
    names = {each.name for each in fields(config)} - {*_OF_ANSWERS}
    told = [name for name, value in protocol.items() if name in names and value is not None]
    if not told:
        return []
    return [f"The file does not say how its prompts were made; as this command has it: {', '.join(told)}."]


def rated(where: str, task: str, score: Callable[[], float]) -> float:
    """Return the score of a line's answer (DataError: what it is held to is of another form)."""
    try:
        return score()
    except (TypeError, ValueError, IndexError, RecursionError) as error:
        raise DataError(f"{where} is no answer to {task}: what is expected is of another form.") from error


def own_score(rate: Callable[..., float], where: str, row: Any) -> QuestionScore:
    """Return the score of a line of `answers.jsonl`.

    Raises:
        DataError: it is none.
    """
    task, answer = text_fields(where, row, ("task", "answer"), "answer")
    expected, length, depth = row.get("expected"), row.get("length"), row.get("depth")
    if not isinstance(expected, list) or not expected or not all(isinstance(text, str) for text in expected):
        raise DataError(f"{where} is no answer: no list of texts under 'expected'.")
    if not is_a(length, int) or length < 0 or not (depth is None or is_a(depth, float)):
        raise DataError(f"{where} is no answer: no whole number under 'length', or another 'depth' than a number.")
    tokens = row.get("num_prompt_tokens")
    score = rated(where, task, partial(rate, task, tuple(expected), answer, str(row.get("asked", ""))))
    return QuestionScore(task, length, depth, score, tokens if is_a(tokens, int) else 0)


def key_score(rate: Callable[..., float], where: str, row: Any) -> QuestionScore:
    """Return the score of a line of `answers.jsonl` with one key; raises as `own_score`, and for several."""

    def rate_key(task: str, expected: Sequence[str], answer: str, asked: str) -> float:
        if len(expected) != 1:
            raise DataError(f"{where} is no answer to one key: it has {len(expected)} texts under 'expected'.")
        return rate(task, expected, answer)

    return own_score(rate_key, where, row)


def answer_files(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return answers as the file of a result that --predictions reads; no file without an answer."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return {"answers.jsonl": text} if text else {}


def score_of(question: Question, score: float) -> QuestionScore:
    """Return a question's score at its place."""
    return QuestionScore(question.task, question.length, question.depth, score, len(question.input_ids))


def most_that_fit(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number that fits: above `low`, which does; `high` is tried first, and doubled."""
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def first_that_holds(lengths: Sequence[int], sizes: Sequence[int], data: str | None) -> list[tuple[int, int]]:
    """Return (number, length) of the rows that fit, each at the first of `lengths` that holds its tokens.

    Raises:
        ConfigError: none fits.
    """
    places = ((i, next((n for n in sorted(lengths) if size <= n), None)) for i, size in enumerate(sizes))
    found = [(number, length) for number, length in places if length is not None]
    if not found:
        raise ConfigError(f"No row of {data} fits {max(lengths):,} tokens: give longer --lengths.")
    return found


def begins_with(answer: str, expected: str) -> float:
    """Return 1 if an answer begins with the expected word or number, and not a longer one; else 0."""
    text = answer.lstrip()
    return float(text.startswith(expected) and not text[len(expected) :][:1].isalnum())


def mean_at(
    scores: Sequence[Any], spell: Callable[[int], str] = str
) -> Callable[[str | None, str | None], float | None]:
    """Return what gives the mean score at (task, length), None for all of them; None without a question there.

    Args:
        spell: how users spell a length.
    """

    import numpy as np

    def mean(task: str | None, length: str | None) -> float | None:
        chosen = [each.score for each in scores if task in (None, each.task) and length in (None, spell(each.length))]
        return float(np.mean(chosen)) if chosen else None

    return mean


def cells_of(scores: Sequence[QuestionScore], *, by_task: bool = True, by_depth: bool = True) -> list[dict[str, Any]]:
    """Return one row per task, length and depth, sorted; tasks stay in their order.

    `score` is the mean share of the expected answers that were found, `part` the share of the questions with at least
    one of them, `whole` with all of them; `low` and `high` are the 95 % interval of `score`: Wilson's if answers are
    right or wrong, else a bootstrap over questions.

    Args:
        by_task: False for all tasks together, every question counted once.
        by_depth: False for all depths together.
    """
    groups = grouped(scores, by_task=by_task, by_depth=by_depth)
    return [_cell(*key, rows) for key, rows in groups]


def _cell(task: str, length: int, depth: float | None, scores: Sequence[QuestionScore]) -> dict[str, Any]:
    import numpy as np

    from longext.evals.statistics import share_interval

    shares = np.array([each.score for each in scores])
    low, high = share_interval(shares)
    return {
        "task": task,
        "length": length,
        "depth": depth,
        "num_trials": len(scores),
        "score": float(shares.mean()),
        "low": low,
        "high": high,
        "part": float((shares > 0).mean()),
        "whole": float((shares == 1).mean()),
        "num_tokens": sum(each.num_tokens for each in scores) / len(scores),
    }


def text_hash(texts: Iterable[str]) -> str:
    """Return a SHA-256 over texts: results with the same one are on the same data."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def answer_line(
    place: Any, name: str, expected: Sequence[str], answer: str, score: float, **more: Any
) -> dict[str, Any]:
    """Return a line of answers.jsonl; `place` has task, length and depth."""
    return {
        "id": name,
        "task": place.task,
        "length": place.length,
        "depth": place.depth,
        "expected": list(expected),
        "answer": answer,
        "score": score,
        **more,
    }


def _generated_line(question: Question, score: QuestionScore, answer: Prediction) -> dict[str, Any]:
    return answer_line(
        question,
        question.id,
        question.expected,
        answer.text,
        score.score,
        num_prompt_tokens=answer.num_prompt_tokens,
        num_new_tokens=answer.num_new_tokens,
        num_thought_tokens=answer.num_thought_tokens,
        is_cut=answer.is_cut,
        **({"asked": question.asked} if question.asked else {}),
    )
