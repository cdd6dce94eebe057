"""Evaluations whose answers are right, wrong or partly right: questions, scores, cells with intervals, the record."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.evals.base import Advance, Outcome, QuestionEval, Work, fail_under, silent
from longext.evals.limits import ALL, PLACES, Place, PlaceLimit, place_limits
from longext.evals.views import NEVER, ONE, PROMPT, Detail, HeatMap, Lines
from longext.manifest import result_record
from longext.models.answer_file import tokens_hash
from longext.models.batching import batched_by
from longext.models.chat import asked_facts, chat_tokens, user_text, uses_template
from longext.models.methods import check_method

if TYPE_CHECKING:
    import torch

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
        score: text of an answer -> share of `expected` that it holds, 0 to 1.
        max_new_tokens, stop: where the answer ends at the latest.
    """

    id: str
    task: str
    length: int
    depth: float | None = None
    input_ids: tuple[int, ...]
    expected: tuple[str, ...]
    score: Callable[[str], float] = field(compare=False)
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionScore:
    """How one question was answered: its task, length and depth, the share that was right, the tokens of its prompt."""

    task: str
    length: int
    depth: float | None
    score: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class RetrievalEval(QuestionEval):
    """An evaluation that asks questions with known answers: a subclass says which they are, and by what protocol.

    Attributes:
        unit: what progress counts.
        pools: further tables of the record: "by_task" (all depths), "by_length" (all tasks).
        limit_form: what --fail-under takes.
    """

    unit: ClassVar[str] = "prompts"
    pools: ClassVar[tuple[str, ...]] = ()
    limit_form: ClassVar[str] = PLACES

    fail_under: tuple[str, ...] = fail_under()

    def check(self) -> None:
        """Raise ConfigError for a method that cannot be applied."""
        check_method(self.method, self.factor)

    def places(self, data: Any) -> list[Place]:
        """Return every task and length that is measured, lengths as users spell them."""
        raise NotImplementedError

    def spell(self, length: int) -> str:
        """Return a length as users spell it."""
        return str(length)

    def questions(self, model: LanguageModel, data: Any) -> Sequence[Any]:
        """Return every `Question`."""
        raise NotImplementedError

    def protocol(self, model: LanguageModel) -> dict[str, Any]:
        """Return what the record says of the protocol, besides how the model was asked."""
        raise NotImplementedError

    def data_facts(self, data: Any) -> dict[str, Any] | None:
        """Return what the record says of the data."""
        return None

    def notes(self, model: LanguageModel, data: Any, scores: Sequence[QuestionScore]) -> list[str]:
        """Return what a reader of the scores has to know, besides what spoilt answers."""
        return []

    def uses_chat(self, model: LanguageModel) -> bool:
        """Return True if questions go through the tokenizer's chat template."""
        return uses_template(model, self.chat_template)

    def prompt_tokens(self, model: LanguageModel, text: str, opening: str = "") -> tuple[int, ...]:
        """Return a question as tokens: a message in the chat template, or without one the text and then `opening`."""
        text = user_text(model, text)
        return tuple(chat_tokens(model, text) if self.uses_chat(model) else model.encode(f"{text}{opening}"))

    def limits(self, data: Any) -> list[PlaceLimit]:
        """Return the limits of --fail-under."""
        return place_limits(self.fail_under, self.places(data), form=self.limit_form)

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

        requests = [Request(each.id, each.input_ids, each.max_new_tokens, each.stop) for each in questions]
        is_chat = self.uses_chat(model)
        predictions = generate_predictions(model, requests, path, advance, self.batch_tokens, is_chat=is_chat)
        answers = {prediction.id: prediction for prediction in predictions}
        return [score_of(each, each.score(answers[each.id].text)) for each in questions], answers

    def measure(self, model: Any, data: Any, work: Work) -> Outcome:
        """Return the record: every question asked and scored."""
        from longext.models.answers import answer_notes

        started = time.perf_counter()
        questions = self.questions(model, data)
        with work.progress(self.name, len(questions), self.unit) as advance:
            scores, answers = self.ask(model, questions, work.answers, advance)
        seconds = time.perf_counter() - started
        notes = [*self.notes(model, data, scores), *(answer_notes(answers.values()) if answers else [])]
        is_chat = self.uses_chat(model)
        record = result_record(
            self.kind,
            model.describe(),
            {
                **self.protocol(model),
                "chat_template": is_chat,
                **asked_facts(model, is_chat, (tokens_hash(each.input_ids) for each in questions)),
            },
            self.data_facts(data),
            seconds=seconds,
            results=cells_of(scores),
            **{name: cells_of(scores, by_task=name == "by_task", by_depth=False) for name in self.pools},
            notes=notes,
        )
        files = {"answers.jsonl": _answer_lines(questions, scores, answers)} if answers else {}
        return Outcome(record=record, score_at=mean_at(scores, self.spell), notes=notes, files=files)

    def window_notes(self, model: LanguageModel, scores: Sequence[QuestionScore]) -> list[str]:
        """Return a note if prompts are longer than the model has positions (and no memory reads them by segments)."""
        longest, window = max(each.num_tokens for each in scores), model.context_length
        if self.memory or longest <= window:
            return []
        over = sum(each.num_tokens > window for each in scores)
        return [f"{over} of {len(scores)} prompts are longer than the model's {window:,} positions, up to {longest:,}."]


def score_of(question: Question, score: float) -> QuestionScore:
    """Return a question's score at its place."""
    return QuestionScore(question.task, question.length, question.depth, score, len(question.input_ids))


def first_choices(
    model: LanguageModel, prompts: Sequence[tuple[Sequence[int], Sequence[int]]], size: int, advance: Advance = silent
) -> list[torch.Tensor]:
    """Return for each (prompt, answer) which tokens of the answer are the model's first choice, bool [n].

    One forward pass over prompt + answer decides it, `size` of one length at once: greedy decoding gives the answer if
    and only if every token is the first choice given the prompt and the answer before it. A length-dependent RoPE has
    the rotation of prompt + answer throughout, as `LanguageModel.greedy` has.
    """
    import torch

    rows: list[torch.Tensor] = []
    for batch in batched_by(prompts, size, lambda pair: (len(pair[0]), len(pair[1]))):
        ids = torch.tensor([[*prompt, *answer] for prompt, answer in batch])
        rows += model.score(ids, len(batch[0][0])).is_top1.cpu()
        advance(len(batch))
    return rows


def mean_at(
    scores: Sequence[QuestionScore], spell: Callable[[int], str] = str
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
    tasks = list(dict.fromkeys(each.task for each in scores)) if by_task else [ALL]
    groups: dict[tuple[str, int, float | None], list[QuestionScore]] = {}
    for each in scores:
        key = (each.task if by_task else ALL, each.length, each.depth if by_depth else None)
        groups.setdefault(key, []).append(each)
    order = sorted(groups, key=lambda key: (tasks.index(key[0]), key[1], -1 if key[2] is None else key[2]))
    return [_cell(task, length, depth, groups[task, length, depth]) for task, length, depth in order]


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


def _answer_lines(
    questions: Sequence[Question], scores: Sequence[QuestionScore], answers: Mapping[str, Prediction]
) -> str:
    """Return JSON lines: what was expected, the answer, its score."""
    lines = []
    for question, score in zip(questions, scores, strict=True):
        answer = answers[question.id]
        row = {
            "id": question.id,
            "expected": list(question.expected),
            "answer": answer.text,
            "score": score.score,
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_new_tokens": answer.num_new_tokens,
            "num_thought_tokens": answer.num_thought_tokens,
            "is_cut": answer.is_cut,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


# --- tables and pictures ----------------------------------------------------------------------------------------------

MEAN_TOKENS = Detail("tokens", "num_tokens", "{:,.0f}")
_TRIALS = ("prompts", "num_trials")


def by_task(title: str, of: str, axis: str = PROMPT, **more: Any) -> Lines:
    """Return the view of scores by length, a block for each task."""
    return Lines(title, of=of, panel="task", axis=axis, per_cell=_TRIALS, **more)


def pooled(title: str, **more: Any) -> Lines:
    """Return the view of all tasks together; they are drawn task by task in another view."""
    return Lines(
        title, of="by_length.score", axis=PROMPT, name="all", pooled=True, picture=NEVER, per_cell=_TRIALS, **more
    )


def task_map(title: str, of: str, **more: Any) -> HeatMap:
    """Return the picture of a single result: tasks by lengths."""
    return HeatMap(title, of=of, rows="task", name="tasks", table=NEVER, picture=ONE, **more)


def depth_map(title: str, of: str, **more: Any) -> HeatMap:
    """Return the view of depths by lengths."""
    return HeatMap(title, of=of, name="depths", rows="depth", rows_name="depth", spell_row=_spell_depth, **more)


def _spell_depth(depth: float | None) -> str:
    return "random" if depth is None else f"{depth:.0%}"


def depths_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the depths of a record, which must agree for its scores to share a table with others."""
    depths = {row.get("depth") for row in record["results"]} - {None}
    return {"depths": sorted(depths)} if depths else {}
