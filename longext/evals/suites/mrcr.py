"""Tell apart several answers to the same request in a long conversation: OpenAI's MRCR, by length.

Example: longext eval mrcr MODEL --lengths 8192,32768 --needles 2,4,8

OpenAI's rows from a file: longext eval mrcr MODEL --data mrcr.jsonl
"""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.data.json_lines import rows_of, text_fields
from longext.errors import ConfigError, DataError
from longext.evals.base import register
from longext.evals.limits import Place, check_lengths
from longext.evals.ranks import Choices, choices_of, ranked_view
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, first_that_holds, most_that_fit, text_hash
from longext.evals.ruler.sources import read_essays, split_sentences
from longext.evals.ruler.words import ADJECTIVES, NOUNS
from longext.evals.views import SEVERAL, Section, by_task
from longext.models.chat import render_chat, user_text, with_prefix
from longext.settings import LENGTH, MANY, option
from longext.untrusted import parse_json

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel

Messages = tuple[tuple[str, str], ...]  # (role, text)
_FORMS = ("short tale", "letter", "note", "report", "sermon", "riddle", "speech", "diary entry", "rhyme", "notice")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_WHERE = "The Hub dataset openai/mrcr has them as parquet; datasets' `to_json` writes a file of rows."


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        num_needles: requests that are the same.
        messages: the last one asks.
        mark: what an answer has to begin with.
        answer: the right text, behind the mark.
        others: texts of the same request.
    """

    num_needles: int
    messages: Messages
    mark: str
    answer: str
    others: tuple[str, ...] = ()


def mrcr_score(mark: str, answer: str, response: str) -> float:
    """Return OpenAI's score: 0 unless a response begins with the mark, else difflib's ratio of what follows it."""
    if not response.startswith(mark):
        return 0.0
    return SequenceMatcher(None, response.removeprefix(mark), answer.removeprefix(mark)).ratio()


@register("mrcr")
@dataclass(frozen=True, kw_only=True)
class Mrcr(RetrievalEval):
    """Multi-round coreference (openai/mrcr): of 2, 4 or 8 answers to the same request one is asked for again."""

    kind: ClassVar[str] = "mrcr"
    unit: ClassVar[str] = "conversations"
    pools: ClassVar[tuple[str, ...]] = ("by_task",)
    has_shares: ClassVar[bool] = False
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="mrcr",
            title="MRCR",
            views=(by_task("MRCR score by length and needles", "by_task.score", picture=SEVERAL), ranked_view()),
        ),
    )

    data: str | None = option(
        None, "File of OpenAI's rows (JSON lines); without it conversations are made here.", panel="Data"
    )
    lengths: tuple[int, ...] = option(
        (2048, 4096, 8192), "Most tokens of a conversation and its answer, comma-separated.", le=LENGTH
    )
    needles: tuple[int, ...] = option((2, 4, 8), "Numbers of requests that are the same, comma-separated.", ge=2, le=8)
    num_trials: int = option(10, "Conversations per length and number of needles.", ge=1, le=MANY)
    essays: str = option("book", "Whose sentences answers are made of: book, a text file, or a folder.", panel="Data")
    answer_words: int = option(60, "Words of an answer, about.", ge=8, le=2000)

    def check(self) -> None:
        """Raise ConfigError for lengths that are too short or needles named twice."""
        check_lengths(self.lengths, minimum=256)
        if not self.needles or len(set(self.needles)) < len(self.needles):
            raise ConfigError(f"--needles must be different numbers of 2 to 8, got {list(self.needles)}.")
        super().check()

    def read_data(self) -> Any:
        """Return the rows of --data, or the sentences that answers are made of."""
        if self.data is None:
            return split_sentences(" ".join(read_essays(self.essays).split()))
        return read_rows(Path(self.data).expanduser(), self.needles)

    def places(self, data: Any) -> list[Place]:
        """Return the numbers of needles and the lengths."""
        return [(_task(count), str(length)) for count in self.needles for length in sorted(self.lengths)]

    def questions(self, model: LanguageModel, data: Any) -> list[Question]:
        """Return every conversation.

        Raises:
            ConfigError: a length is too short for as many needles.
        """
        if self.data is not None:
            return self._of_rows(model, data)
        questions = []
        for count in self.needles:
            for length in sorted(self.lengths):
                for trial in range(self.num_trials):
                    rng = random.Random(f"{self.seed} mrcr {count} {length} {trial}")
                    made = self._conversation(model, data, rng, count, length)
                    questions.append(self._question(model, made, length, f"{_task(count)}/{length}/{trial}"))
        return questions

    def _of_rows(self, model: LanguageModel, rows: Sequence[Conversation]) -> list[Question]:
        """Return the rows that fit the longest of --lengths, each at the first length that it fits."""
        texts = (model.encode(row.mark + row.answer, add_bos=False) for row in rows)
        sizes = [len(self._ids(model, row, "")) + len(answer) for row, answer in zip(rows, texts, strict=True)]
        return [
            self._question(model, rows[number], length, f"{_task(rows[number].num_needles)}/{length}/{number}")
            for number, length in first_that_holds(self.lengths, sizes, self.data)
        ]

    def _conversation(
        self, model: LanguageModel, sentences: Sequence[str], rng: random.Random, count: int, length: int
    ) -> Conversation:
        """Return a conversation of as many turns as fit; draws are the same for every model of one tokenizer."""
        turns = _Turns(rng, [user_text(model, each) for each in sentences], self.answer_words, count)
        budget = len(model.encode(turns.mark + turns.asked_for, add_bos=False)) + 1

        def fits(number: int) -> bool:
            return len(self._ids(model, turns.conversation(number), "")) + budget <= length

        if not fits(count):
            raise ConfigError(f"MRCR with {count} needles does not fit {length:,} tokens: give longer --lengths.")
        return turns.conversation(most_that_fit(fits, count, 2 * count))

    def _ids(self, model: LanguageModel, row: Conversation, opening: str) -> tuple[int, ...]:
        """Return a conversation as tokens: in the chat template, or as lines "User:" and "Assistant:"."""
        if not self.uses_chat(model):
            lines = (f"{role.capitalize()}: {text}" for role, text in row.messages)
            return tuple(model.encode("\n\n".join([*lines, f"Assistant:{opening}"])))
        messages = [{"role": role, "content": text} for role, text in row.messages]
        return tuple(with_prefix(model, model.encode(f"{render_chat(model, messages)}{opening}", add_bos=False)))

    def _question(self, model: LanguageModel, row: Conversation, length: int, name: str) -> Question:
        budget = len(model.encode(row.mark + row.answer, add_bos=False)) + 1
        choices: Choices | None = None
        if self.ranks and row.others:
            begun = f" {row.mark}" if not self.uses_chat(model) else row.mark
            encode = partial(model.encode, add_bos=False)
            choices = choices_of(
                encode, lambda opening: self._ids(model, row, opening), begun, [row.answer], row.others
            )
        task, expected = _task(row.num_needles), (row.mark, row.answer)
        silent = dataclasses.replace(row, messages=tuple((role, "") for role, _ in row.messages))
        return Question(
            id=name,
            task=task,
            length=length,
            input_ids=self._ids(model, row, ""),
            expected=expected,
            max_new_tokens=budget,
            choices=choices,
            frame_ids=self._ids(model, silent, "") if self.uses_chat(model) else (),
        )

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return OpenAI's score; white space before an answer, which base models begin with, is left out."""
        return mrcr_score(expected[0], expected[1], answer.lstrip())

    def given_score(self, where: str, row: Any) -> QuestionScore:
        """Return the score of a line: OpenAI's row with a "response", or one of answers.jsonl."""
        if not isinstance(row, dict) or "random_string_to_prepend" not in row:
            return super().given_score(where, row)
        mark, answer, response = text_fields(where, row, ("random_string_to_prepend", "answer", "response"), "answer")
        count = row.get("n_needles") if isinstance(row.get("n_needles"), int) else 0
        return QuestionScore(_task(int(count or 0)), 0, None, mrcr_score(mark, answer, response), 0)

    def protocol(self, model: Any) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        return {
            "id": "mrcr" if self.data is None else "mrcr/openai",
            "definition": "a long conversation in which 2, 4 or 8 requests are the same and have different answers; "
            "the last turn asks for one of these again, behind a random string; greedy, up to the tokens of the answer",
            "reference": "openai/mrcr (Hub)",
            "scoring": "0 unless the answer begins with the string, else difflib's SequenceMatcher ratio of the rest",
            "needles": sorted(self.needles),
            "lengths": sorted(self.lengths),
            "num_trials": None if self.data else self.num_trials,
            "answer_words": None if self.data else self.answer_words,
            "seed": self.seed,
        }

    def data_facts(self, data: Any) -> dict[str, Any]:
        """Return what the record says of the texts."""
        texts = data if self.data is None else (each.answer for each in data)
        return {"data": self.data or f"made here, of {self.essays}", "sha256": text_hash(texts)}

    def notes(self, model: LanguageModel, data: Any, scores: Sequence[Any]) -> list[str]:
        """Return a note on own texts."""
        own = ["Conversations are longext's own: compare with results on the same, not with published ones."]
        return own if self.data is None else []


def _task(count: int) -> str:
    return f"{count} needles"


class _Turns:
    """Requests and answers of a conversation, drawn once: a longer one has the turns of a shorter one and more."""

    def __init__(self, rng: random.Random, sentences: Sequence[str], words: int, count: int) -> None:
        self._rng, self._sentences, self._words, self._count = rng, sentences, words, count
        self.mark = "".join(rng.choices(string.ascii_letters + string.digits, k=10))
        self._asked = rng.randrange(count)
        self._request = self._draw_request()
        self._answers = [self._draw_text() for _ in range(count)]
        self._fill: list[tuple[str, str]] = []
        self._order = random.Random(rng.random())
        self.asked_for = self._answers[self._asked]

    def conversation(self, number: int) -> Conversation:
        """Return a conversation of `number` turns before the question."""
        while len(self._fill) < number - self._count:
            if (request := self._draw_request()) != self._request:
                self._fill.append((request, self._draw_text()))
        places = sorted(random.Random(f"{self.mark} {number}").sample(range(number), self._count))
        fill, answers = iter(self._fill), iter(self._answers)
        turns = [(self._request, next(answers)) if i in places else next(fill) for i in range(number)]
        messages = [message for request, text in turns for message in (("user", request), ("assistant", text))]
        what = self._request.removeprefix("Write a ").rstrip(".")
        question = f"Prepend {self.mark} to the {_ORDINALS[self._asked]} {what}. Do not include any other text."
        others = tuple(text for text in self._answers if text != self.asked_for)
        return Conversation(self._count, (*messages, ("user", question)), self.mark, self.asked_for, others)

    def _draw_request(self) -> str:
        form, noun = self._rng.choice(_FORMS), self._rng.choice(NOUNS)
        return f"Write a {form} about a {self._rng.choice(ADJECTIVES)} {noun}."

    def _draw_text(self) -> str:
        parts: list[str] = []
        while sum(len(part.split()) for part in parts) < self._words:
            parts.append(self._rng.choice(self._sentences))
        return " ".join(parts)


def read_rows(path: Path, needles: Sequence[int]) -> list[Conversation]:
    """Return OpenAI's rows with so many needles.

    Raises:
        ConfigError, DataError: no such file, or a line of another form, with its number.
    """
    rows = rows_of(path, _row, "a file of MRCR rows (JSON lines)", _WHERE)
    chosen = [row for row in rows if row.num_needles in needles]
    if not chosen:
        raise DataError(f"{path} holds no row with --needles {','.join(map(str, needles))}.")
    return chosen


def _row(where: str, value: Any) -> Conversation:
    prompt, mark, answer = text_fields(where, value, ("prompt", "random_string_to_prepend", "answer"), "row of MRCR")
    messages, count = parse_json(prompt, f"{where}, prompt"), value.get("n_needles")
    is_talk = isinstance(messages, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    )
    if not is_talk or not messages or not isinstance(count, int):
        raise DataError(f"{where} is no row of MRCR: 'prompt' must be JSON of messages, 'n_needles' a whole number.")
    asked = [(each["role"], each["content"]) for each in messages]
    right = answer.removeprefix(mark)
    requests = [text for (role, _), (other, text) in zip(asked, asked[1:], strict=False) if other == "assistant"]
    others = _same_request(asked, right)
    return Conversation(count, tuple(asked), mark, right, others if right in requests else ())


def _same_request(messages: Sequence[tuple[str, str]], right: str) -> tuple[str, ...]:
    """Return the other answers to the request that `right` answers."""
    pairs = [(a[1], b[1]) for a, b in zip(messages, messages[1:], strict=False) if b[0] == "assistant"]
    request = next((request for request, text in pairs if text == right), None)
    return tuple(dict.fromkeys(text for asked, text in pairs if asked == request and text != right))
