"""Questions on paragraphs, for RULER's qa tasks: the set that ships with longext, SQuAD's and HotpotQA's files.

A file of the first kind is JSON lines: paragraphs ("id", "article", "text", "questions" with "question" and "answers"),
then questions that need two of them ("question", "answers", "paragraphs").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from longext.checkpoint.bundled import QUESTIONS
from longext.errors import DataError
from longext.untrusted import json_lines, read_json


@dataclass(frozen=True)
class PassageQuestion:
    """One question: `gold` are the places of the paragraphs that answer it, `near` of others of the same article."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions and all paragraphs of a set, sorted; `name` is what a record calls it."""

    name: str
    questions: tuple[PassageQuestion, ...]
    paragraphs: tuple[str, ...]


def own_questions(kind: str) -> QuestionSet:
    """Return longext's own questions on one paragraph ("one") or on two ("two").

    Questions on one paragraph go round the paragraphs, so that few of them are about many.
    """
    rows = [row for _, row in json_lines(QUESTIONS)]
    passages = [row for row in rows if "text" in row]
    places = {text: i for i, text in enumerate(sorted(row["text"] for row in passages))}
    at = {row["id"]: places[row["text"]] for row in passages}
    if kind == "two":
        asked = [
            PassageQuestion(row["question"], tuple(row["answers"]), tuple(at[name] for name in row["paragraphs"]))
            for row in rows
            if "paragraphs" in row
        ]
    else:
        by_passage = [
            _asked_of(row, [each for each in passages if each["article"] == row["article"]], at) for row in passages
        ]
        asked = [question for turn in zip_longest(*by_passage) for question in turn if question is not None]
    return QuestionSet(f"longext's own, {len(asked)} on {len(places)} paragraphs", tuple(asked), tuple(places))


def _asked_of(
    row: Mapping[str, Any], article: Sequence[Mapping[str, Any]], at: Mapping[str, int]
) -> list[PassageQuestion]:
    near = tuple(at[each["id"]] for each in article if each["id"] != row["id"])
    return [PassageQuestion(q["question"], tuple(q["answers"]), (at[row["id"]],), near) for q in row["questions"]]


def squad_questions(path: Path) -> QuestionSet:
    """Return the answerable questions of a SQuAD 2.0 file (`dev-v2.0.json`), in its order.

    Raises:
        DataError: no such form.
    """
    data = read_json(path)
    try:
        articles = [article["paragraphs"] for article in data["data"]]
        places = _places(paragraph["context"] for article in articles for paragraph in article)
        asked = []
        for article in articles:
            there = [places[paragraph["context"]] for paragraph in article]
            for paragraph in article:
                own = places[paragraph["context"]]
                near = tuple(place for place in there if place != own)
                asked += [
                    PassageQuestion(q["question"], tuple(answer["text"] for answer in q["answers"]), (own,), near)
                    for q in paragraph["qas"]
                    if not q.get("is_impossible")
                ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no SQuAD file: {_wrong(error)}. dev-v2.0.json of SQuAD is one.") from error
    return _checked(path, "SQuAD", asked, places)


def hotpot_questions(path: Path) -> QuestionSet:
    """Return the questions of a HotpotQA file (`hotpot_dev_distractor_v1.json`), in its order.

    Its ten paragraphs come with each question.

    Raises:
        DataError: no such form.
    """
    data = read_json(path)
    try:
        contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in data]
        places = _places(text for context in contexts for text in context)
        asked = [
            PassageQuestion(row["question"], (row["answer"],), tuple(places[text] for text in context))
            for row, context in zip(data, contexts, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no HotpotQA file: {_wrong(error)}. hotpot_dev_distractor_v1.json of HotpotQA is one."
        ) from error
    return _checked(path, "HotpotQA", asked, places)


def _places(texts: Any) -> dict[str, int]:
    return {text: i for i, text in enumerate(sorted(set(texts)))}


def _wrong(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else "its parts have other types"


def _checked(path: Path, name: str, asked: Sequence[PassageQuestion], places: Mapping[str, int]) -> QuestionSet:
    if not asked or not all(question.answers and all(question.answers) for question in asked):
        raise DataError(f"{path} holds no question, or one without an answer.")
    return QuestionSet(f"{name}, {len(asked)} on {len(places)} paragraphs", tuple(asked), tuple(places))
