"""Four-way questions on long texts: LongBench v2 from a file of its rows; accuracy by difficulty and length.

Example: longext eval longbench2 MODEL --data longbench_v2.jsonl --answers both

Published answers: longext eval longbench2 --predictions results/model.jsonl
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.data.json_lines import repeated_note, text_fields
from longext.errors import ConfigError, DataError
from longext.evals.base import register
from longext.evals.limits import Place
from longext.evals.longbench.cutting import cut_prompt, prompt_limit
from longext.evals.ranks import ranked_view
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, cells_of, text_hash
from longext.evals.views import ONE, SEVERAL, Section, by_task
from longext.settings import LENGTH, option
from longext.untrusted import json_lines, read_json

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel

_LETTERS = "ABCD"
_SIZES = {"short": 1, "medium": 2, "long": 3}  # words: up to 32k, 128k, 2M
_FIELDS = ("context", "question", *(f"choice_{letter}" for letter in _LETTERS), "answer", "difficulty", "length")
_ANSWERS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
_OPENING = "The correct answer is ("
_WHERE = "They are data.json of the Hub dataset THUDM/LongBench-v2."
_PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)


def read_letter(answer: str) -> str | None:
    """Return the letter of "The correct answer is (X)" in an answer, stars left out; None if there is none."""
    text = answer.replace("*", "")
    found = next((match for pattern in _ANSWERS if (match := pattern.search(text))), None)
    return found[1] if found else None


@register("longbench2")
@dataclass(frozen=True, kw_only=True)
class LongBench2(RetrievalEval):
    """LongBench v2 (arXiv 2412.15204): 503 questions with four choices on texts of 8k to 2M words."""

    kind: ClassVar[str] = "longbench2"
    unit: ClassVar[str] = "questions"
    pools: ClassVar[tuple[str, ...]] = ("by_task", "by_length")
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="longbench2",
            title="LongBench v2",
            views=(
                by_task(
                    "LongBench v2 accuracy by difficulty and words (1 short, 2 medium, 3 long)",
                    "results.score",
                    "words of the text (1 short, 2 medium, 3 long)",
                    picture=SEVERAL,
                ),
                by_task("LongBench v2 accuracy", "overall.score", "questions", name="overall", picture=ONE),
                ranked_view("ranked", "words of the text (1 short, 2 medium, 3 long)"),
            ),
        ),
    )
    limit_form: ClassVar[str] = "SCORE, easy=SCORE, hard=SCORE or easy@short=SCORE"

    data: str = option("", "File of the published rows (JSON or JSON lines).", panel="Data")
    max_length: int | None = option(
        None, "Tokens of a prompt; longer ones lose their middle (default: by the context).", ge=2, le=LENGTH
    )
    limit: int | None = option(None, "Only the first rows.", ge=1)
    max_new_tokens: int = option(128, "Tokens of an answer.", ge=1)

    def read_data(self) -> list[dict[str, str]]:
        """Return the rows."""
        return read_rows(self.data)[: self.limit]

    def places(self, data: Sequence[dict[str, str]]) -> list[Place]:
        """Return difficulties and lengths."""
        return [(row["difficulty"], row["length"]) for row in data]

    def spell(self, length: int) -> str:
        """Return short, medium or long."""
        return next((name for name, number in _SIZES.items() if number == length), "unknown")

    def questions(self, model: LanguageModel, data: Sequence[dict[str, str]]) -> list[Question]:
        """Return the question of each row, its prompt cut in the middle where it is too long."""
        names = [row.get("_id", str(number)) for number, row in enumerate(data)]
        repeated = {name for name, count in Counter(names).items() if count > 1}
        return [
            self._question(model, row, f"{name}/{number}" if name in repeated else name)
            for number, (row, name) in enumerate(zip(data, names, strict=True))
        ]

    def _question(self, model: LanguageModel, row: dict[str, str], name: str) -> Question:
        letters = {letter: row[f"choice_{letter}"].strip() for letter in _LETTERS}
        text = _PROMPT.format(context=row["context"].strip(), question=row["question"].strip(), **letters)
        text, is_cut = cut_prompt(model, self, text)
        opening = _OPENING if self.uses_chat(model) else f"\n\n{_OPENING}"
        wrong = [letter for letter in _LETTERS if letter != row["answer"]]
        return Question(
            id=name,
            task=row["difficulty"],
            length=_SIZES[row["length"]],
            input_ids=self.prompt_tokens(model, text, "\n\n"),
            expected=(row["answer"],),
            max_new_tokens=self.max_new_tokens,
            is_cut=is_cut,
            choices=self.choices(model, text, opening, [row["answer"]], wrong),
        )

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return 1 if the letter of the answer is right, else 0."""
        return float(read_letter(answer) == expected[0])

    def given_score(self, where: str, row: Any) -> QuestionScore:
        """Return the score of a line as the authors write it ("response" or "pred"), or of answers.jsonl."""
        if not isinstance(row, dict) or "difficulty" not in row:
            return super().given_score(where, row)
        answer, difficulty, length = text_fields(where, row, ("answer", "difficulty", "length"), "answer")
        response = row.get("response")
        letter = read_letter(response) if isinstance(response, str) else row.get("pred")
        return QuestionScore(difficulty, _SIZES.get(length, 0), None, float(letter == answer), 0)

    def tables(self, scores: Sequence[QuestionScore]) -> dict[str, Any]:
        """Return the tables, and the accuracy of all questions."""
        every = [QuestionScore("all", len(scores), None, each.score, each.num_tokens) for each in scores]
        return {**super().tables(scores), "overall": cells_of(every)}

    def protocol(self, model: Any) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        return {
            "id": "longbench2",
            "definition": f"the authors' prompt without reasoning; longer ones lose their middle; greedy answers of up "
            f"to {self.max_new_tokens} tokens (the authors draw at temperature 0.1)",
            "reference": "LongBench v2, arXiv 2412.15204",
            "scoring": "the letter of the first 'The correct answer is (X)'; an answer without one is wrong and counts "
            "(the authors leave empty responses out)",
            "max_length": self.max_length if model is None else prompt_limit(model, self),
        }

    def data_facts(self, data: Sequence[dict[str, str]]) -> dict[str, Any]:
        """Return what the record says of the rows."""
        texts = (f"{row['context']}{row['question']}{row['answer']}" for row in data)
        return {"data": self.data, "num_rows": len(data), "sha256": text_hash(texts)}

    def notes(self, model: LanguageModel, data: Sequence[dict[str, str]], scores: Sequence[Any]) -> list[str]:
        """Return a note on rows that repeat."""
        return repeated_note(("the rows", row["question"]) for row in data)


def read_rows(file: str) -> list[dict[str, str]]:
    """Return the rows of a file, JSON or JSON lines.

    Raises:
        ConfigError, DataError: no such file, or a row of another form, with its place.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"--data must be a file of LongBench v2's rows, got '{file}'. {_WHERE}")
    if path.suffix == ".json":
        listed = read_json(path)
        placed = enumerate(listed if isinstance(listed, list) else [listed])
        rows = [_row(f"{path}, row {number}", value) for number, value in placed]
    else:
        rows = [_row(where, value) for where, value in json_lines(path)]
    if not rows:
        raise DataError(f"{path} holds no row.")
    return rows


def _row(where: str, value: Any) -> dict[str, str]:
    row = dict(zip(_FIELDS, text_fields(where, value, _FIELDS, "row of LongBench v2"), strict=True))
    if row["answer"] not in _LETTERS or row["length"] not in _SIZES:
        raise DataError(f"{where} is no row of LongBench v2: answers are A to D, lengths short, medium or long.")
    return {**row, **({"_id": value["_id"]} if isinstance(value.get("_id"), str) else {})}
