"""Ask for a fact in words that the text does not have (needles without literal match, as NoLiMa), by length and depth.

Example: longext eval nolit MODEL --lengths 1024,4096,16384
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from longext.checkpoint.bundled import FACTS
from longext.errors import ConfigError
from longext.evals.base import check_tasks, register
from longext.evals.limits import check_depths, check_lengths
from longext.evals.ranks import ranked_view
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, cells_of, most_that_fit, text_hash
from longext.evals.ruler.sources import read_essays, split_sentences
from longext.evals.views import NEVER, ONE, SEVERAL, Section, by_task, depth_map, depths_of, pooled
from longext.models.chat import user_text
from longext.registry import Registry
from longext.settings import LENGTH, MANY, option
from longext.untrusted import json_lines

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel

_BASE_LENGTH, _SHARE = 1024, 0.85  # NoLiMa: a length is effective at 85 % of the best score up to 1K
_NAMES = (
    "Alma Bram Cleo Dirk Elsa Finn Greta Hugo Ines Jonas Kaja Lars Mina Nils Olga Paul Rosa Sven Tilda Ulf Vera Walt "
    "Yara Zeno"
).split()
_APART = 0.2  # share of the text between a fact and what distracts from it
_TASK = (
    "Read the text below. Somewhere in it stands a sentence on a person; a question on the person follows.\n\n{text}"
    "\n\nQuestion: {question} Answer with the name alone."
)
_OPENING = "\nAnswer:"

HOPS: Registry[str] = Registry("task")
HOPS.register("one_hop", "the question follows from the fact by one association")
HOPS.register("two_hop", "it follows by two: a place and its country, a trade and its field")


@dataclass(frozen=True)
class Fact:
    """A sentence with {name} in it, and questions that share no word with it, by task."""

    sentence: str
    questions: Mapping[str, str]


def read_facts() -> list[Fact]:
    """Return longext's facts."""
    rows = [row for _, row in json_lines(FACTS)]
    return [Fact(row["fact"], {task: row[task] for task in HOPS}) for row in rows]


@register("nolit")
@dataclass(frozen=True, kw_only=True)
class NoLit(RetrievalEval):
    """Needles without shared words (after NoLiMa, arXiv 2502.05167), with facts of longext's own."""

    kind: ClassVar[str] = "nolit"
    pools: ClassVar[tuple[str, ...]] = ("by_task", "by_length")
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="nolit",
            title="Needles without shared words",
            measured=depths_of,
            views=(
                by_task("Facts found without shared words", "by_task.score", picture=SEVERAL),
                pooled("Facts found without shared words, both tasks together"),
                depth_map(
                    "Facts found by length and depth", of="results.score", panel="task", table=NEVER, picture=ONE
                ),
                ranked_view(),
            ),
        ),
    )

    tasks: tuple[str, ...] = option(("one_hop", "two_hop"), "Of one_hop and two_hop, comma-separated.")
    lengths: tuple[int, ...] = option(
        (512, 1024, 2048, 4096), "Most tokens of a prompt and its answer, comma-separated.", le=LENGTH
    )
    depths: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0), "Depths of the fact, 0 to 1, comma-separated.", ge=0, le=1
    )
    num_trials: int = option(4, "Facts per task, length and depth.", ge=1, le=MANY)
    num_distractors: int = option(3, "Further facts, on other people, at least a fifth of the text away.", ge=0, le=8)
    essays: str = option("book", "What facts are hidden in: book, a text file, or a folder.", panel="Data")
    max_new_tokens: int = option(24, "Tokens of an answer.", ge=1)

    def check(self) -> None:
        """Raise ConfigError for an unknown task, or lengths and depths that are too short or too close."""
        check_tasks(self.tasks, HOPS)
        check_lengths(self.lengths, minimum=128)
        check_depths(self.depths, 0.001, least=1)
        if self.ranks and not self.num_distractors:
            raise ConfigError("--answers likelihood ranks the names in the text: give --num-distractors 1 or more.")
        super().check()

    def read_data(self) -> list[str]:
        """Return the sentences of the text."""
        return split_sentences(" ".join(read_essays(self.essays).split()))

    @cached_property
    def _facts(self) -> list[Fact]:
        return read_facts()

    def questions(self, model: LanguageModel, data: Sequence[str]) -> list[Question]:
        """Return every prompt; seeds give the same facts for every task, and the same prompts for every model.

        Raises:
            ConfigError: a length is too short.
        """
        text = [user_text(model, each) for each in data]
        return [
            self._question(model, text, task, length, depth, trial)
            for task in self.tasks
            for length in sorted(self.lengths)
            for depth in self.depths
            for trial in range(self.num_trials)
        ]

    def _question(
        self, model: LanguageModel, text: Sequence[str], task: str, length: int, depth: float, trial: int
    ) -> Question:
        rng = random.Random(f"{self.seed} nolit {length} {depth:g} {trial}")
        count = 1 + self.num_distractors
        facts, names = rng.sample(self._facts, count), rng.sample(_NAMES, count)
        hidden = [fact.sentence.format(name=name) for fact, name in zip(facts, names, strict=False)]
        places = [depth, *(_far(rng, depth) for _ in facts[1:])]
        start, asked = rng.randrange(len(text)), facts[0].questions[task]

        def prompt(number: int) -> str:
            there = [text[(start + i) % len(text)] for i in range(number)]
            return _TASK.format(text=_hidden(there, hidden, places), question=asked)

        low = self._most(model, prompt, length)
        distractors = names[1:count]
        return Question(
            id=f"{task}/{length}/{depth:g}/{trial}",
            task=task,
            length=length,
            depth=depth,
            input_ids=self.prompt_tokens(model, prompt(low), _OPENING),
            expected=(names[0], *distractors),
            max_new_tokens=self.max_new_tokens,
            choices=self.choices(model, prompt(low), _OPENING, names[:1], distractors) if distractors else None,
        )

    def _most(self, model: LanguageModel, prompt: Any, length: int) -> int:
        """Return the most sentences that fit."""

        def fits(number: int) -> bool:
            return len(self.prompt_tokens(model, prompt(number), _OPENING)) + self.max_new_tokens <= length

        if not fits(1):
            raise ConfigError(f"A fact, its text and the question do not fit {length:,} tokens: give longer --lengths.")
        return most_that_fit(fits, 1, 2)

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return 1 if the answer has the first name of `expected` and none of the others, which distract."""
        words = set("".join(letter if letter.isalnum() else " " for letter in answer.lower()).split())
        return float(expected[0].lower() in words and not any(name.lower() in words for name in expected[1:]))

    def tables(self, scores: Sequence[QuestionScore]) -> dict[str, Any]:
        """Return the tables, with the effective length relative to short texts."""
        return {**super().tables(scores), "effective": relative_length(cells_of(scores, by_task=False, by_depth=False))}

    def protocol(self, model: Any) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        return {
            "id": "nolit",
            "definition": "a sentence on a person between sentences of a text, and a question on it that shares no "
            "word with it; greedy answers; likelihood: among the names in the text",
            "reference": "after NoLiMa, arXiv 2502.05167; facts and questions are longext's own",
            "scoring": "the person's name is a word of the answer and no distracting person's is",
            "tasks": {task: HOPS[task] for task in self.tasks},
            "lengths": sorted(self.lengths),
            "num_distractors": self.num_distractors,
            "max_new_tokens": self.max_new_tokens,
            "effective": f"longest length with {_SHARE:.0%} of the best score at {_BASE_LENGTH:,} tokens or fewer",
            "seed": self.seed,
        }

    def data_facts(self, data: Sequence[str]) -> dict[str, Any]:
        """Return what the record says of the text."""
        return {"data": f"longext's facts in {self.essays}", "num_facts": len(self._facts), "sha256": text_hash(data)}

    def notes(self, model: LanguageModel, data: Any, scores: Sequence[Any]) -> list[str]:
        """Return a note on own facts."""
        return ["Facts and questions are longext's own: compare with results on the same, not with NoLiMa's."]


def _far(rng: random.Random, depth: float) -> float:
    """Return a depth that is at least a fifth of the text away."""
    while abs((place := rng.random()) - depth) < _APART:
        pass
    return place


def _hidden(text: Sequence[str], hidden: Sequence[str], depths: Sequence[float]) -> str:
    """Return a text with sentences hidden at depths, between its own."""
    parts = list(text)
    for depth, sentence in sorted(zip(depths, hidden, strict=True), reverse=True):
        parts.insert(round(depth * len(text)), sentence)
    return " ".join(parts)


def relative_length(by_length: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the base score (the best up to 1,024 tokens) and the longest length at 85 % of it.

    `tokens_low` and `tokens_high` are those whose interval's ends reach it. None without a length up to 1,024 or with a
    base score of 0.
    """
    base = max((row["score"] for row in by_length if row["length"] <= _BASE_LENGTH), default=0.0)

    def longest(key: str) -> int | None:
        return max((row["length"] for row in by_length if row[key] >= _SHARE * base), default=0) if base else None

    return {
        "base": base,
        "tokens": longest("score"),
        "tokens_low": longest("low"),
        "tokens_high": longest("high"),
    }
