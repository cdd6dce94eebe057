"""RULER: samples equal to those of NVIDIA's own generators, exact budgets, scores, effective length, own questions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from functools import cache
from pathlib import Path

import pytest

from longext.checkpoint.bundled import QUESTIONS
from longext.errors import ConfigError, DataError
from longext.evals.ruler.questions import hotpot_questions, own_questions, squad_questions
from longext.evals.ruler.samples import TooShort, ruler_samples
from longext.evals.ruler.sources import read_sources
from longext.evals.ruler.tasks import RULER_TASKS, ruler_score
from longext.evals.suites.ruler import Ruler, effective_length, means_by_length

FIXTURE = json.loads((Path(__file__).parents[1] / "golden/ruler_samples.json").read_text())["samples"]


def count(text, opening):
    """The tokens of the run that made the fixture: words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text + opening))


@cache
def rows():
    return [json.loads(line) for line in QUESTIONS.read_text().splitlines()]


def as_squad(path):
    articles = {}
    for row in rows():
        if "text" in row:
            asked = [
                {"question": q["question"], "answers": [{"text": a} for a in q["answers"]]} for q in row["questions"]
            ]
            articles.setdefault(row["article"], []).append({"context": row["text"], "qas": asked})
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs} for paragraphs in articles.values()]}))
    return str(path)


def as_hotpot(path):
    passages = {row["id"]: [row["article"], [row["text"]]] for row in rows() if "text" in row}
    asked = [
        {"question": row["question"], "answer": row["answers"][0], "context": [passages[i] for i in row["paragraphs"]]}
        for row in rows()
        if "paragraphs" in row
    ]
    path.write_text(json.dumps(asked))
    return str(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    return read_sources("own", "book", as_squad(folder / "squad.json"), as_hotpot(folder / "hotpot.json"))


@pytest.mark.parametrize("task", RULER_TASKS)
def test_samples_are_those_of_nvidias_generators(sources, task):
    expected = {key: value for key, value in FIXTURE.items() if key.startswith(f"{task}/")}
    assert len(expected) == 3
    for key, wanted in expected.items():
        _, length, seed, overhead = key.split("/")
        found = ruler_samples(
            task,
            sources,
            length=int(length),
            number=len(wanted),
            seed=int(seed),
            count=count,
            overhead=int(overhead),
        )
        hashes = [
            [
                hashlib.sha256(json.dumps([each.text, each.opening, list(each.answers)]).encode()).hexdigest()[:16],
                count(each.text, each.opening) + RULER_TASKS[task].max_new_tokens,
            ]
            for each in found
        ]
        assert hashes == wanted, key


@pytest.mark.parametrize("task", RULER_TASKS)
def test_every_length_is_filled_and_never_exceeded(sources, task):
    budget = RULER_TASKS[task].max_new_tokens
    for length in (768, 1500, 5000):
        for sample in ruler_samples(task, sources, length=length, number=2, seed=1, count=count):
            assert 0.8 * length < count(sample.text, sample.opening) + budget <= length
            assert len(sample.wrong) == 9
            assert not {each.lower() for each in sample.wrong} & {each.lower() for each in sample.answers}


@pytest.mark.parametrize("task", RULER_TASKS)
def test_what_cannot_fit_ends_with_a_line(sources, task):
    with pytest.raises(TooShort, match=rf"RULER's {task} does not fit 130 tokens, \d+ of them for the answer"):
        ruler_samples(task, sources, length=130, number=2, seed=1, count=count)


def test_prompts_of_a_model_keep_to_the_budget_and_follow_the_seed(books):
    task = Ruler(model="m", lengths=(900,), num_trials=1, answers="both")
    data = task.read_data()
    asked = task.questions(books, data)
    assert asked == task.questions(books, data)
    for question in asked:
        budget = RULER_TASKS[question.task].max_new_tokens
        assert len(question.input_ids) + budget <= question.length
        assert list(question.input_ids[: len(books.prefix)]) == list(books.prefix)
        text = books.decode(question.input_ids)
        assert text.rstrip().endswith(("is", "are", "Answer:", "are:", "list are:"))
        right = [books.decode(ids).strip() for ids in question.choices.right]
        assert right == list(question.expected[: len(right)])
    early = dataclasses.replace(task, answers="generate", error_rate=0.05, fail_under=("fwe=0.5",))
    assert any("no sample fits or the verdicts did not need them: " in n for n in early.notes(books, data, []))
    with pytest.raises(ConfigError, match="does not fit 128 tokens"):
        Ruler(model="m", lengths=(128,), num_trials=1, tasks=("cwe",)).questions(books, data)


def test_scores_are_the_published_ones():
    assert ruler_score("vt", ["ABCDE", "FGHIJ", "KLMNO"], "abcde and klmno") == pytest.approx(2 / 3)
    assert ruler_score("qa_1", ["the Teal", "Teal"], " TEAL\x00river") == 1
    assert ruler_score("qa_2", ["yes"], "no") == 0
    assert ruler_score("fwe", ["abc"], "") == 0
    assert ruler_score("niah_multivalue", ["1234567", "7654321"], "1234567,\x07 7654321") == 1


def test_effective_length_needs_all_tasks_and_has_an_interval():
    def table(length, share, tasks):
        return [
            {"task": t, "length": length, "score": share, "low": share - 0.2, "high": min(share + 0.2, 1)}
            | {"num_trials": 5, "num_tokens": length}
            for t in tasks
        ]

    names = list(RULER_TASKS)
    by_task = [
        *table(512, 1.0, names[:5]),
        *table(1024, 0.99, names),
        *table(2048, 0.87, names),
        *table(4096, 0.84, names),
    ]
    by_length = means_by_length(by_task)
    assert [row["num_tasks"] for row in by_length] == [5, 13, 13, 13]
    assert by_length[1]["low"] == pytest.approx(0.99 - 0.2 / 13**0.5)
    assert effective_length(by_length) == {"tokens": 2048, "tokens_low": 1024, "tokens_high": 4096}
    assert effective_length(by_length[:1]) == {"tokens": None, "tokens_low": None, "tokens_high": None}
    assert effective_length(means_by_length(table(1024, 0.1, names)))["tokens"] == 0


def test_own_questions_are_many_and_answered_by_their_paragraphs():
    one, two = own_questions("one"), own_questions("two")
    assert len(one.questions) >= 200
    assert len(two.questions) >= 40
    assert len(one.paragraphs) >= 60
    texts = [question.text for question in (*one.questions, *two.questions)]
    assert len(set(texts)) == len(texts)
    assert len({question.gold for question in one.questions[:70]}) == 70  # few questions are about many paragraphs
    for question in (*one.questions, *two.questions):
        text = " ".join(one.paragraphs[place] for place in question.gold).lower()
        held = any(answer.lower() in text for answer in question.answers)
        assert held or question.answers == ("dax",), question
        assert len(question.gold) == (1 if question in one.questions else 2)


@pytest.mark.parametrize(
    ("read", "content", "text"),
    [
        (squad_questions, {"data": [{"title": "x"}]}, "no 'paragraphs'"),
        (squad_questions, [1], "other types"),
        (squad_questions, {"data": []}, "holds no question"),
        (hotpot_questions, [{"question": "q", "answer": "a"}], "no 'context'"),
        (hotpot_questions, {"a": 1}, "other types"),
    ],
)
def test_files_of_another_form_end_in_one_line(tmp_path, read, content, text):
    (tmp_path / "q.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=text):
        read(tmp_path / "q.json")


def test_answers_of_nvidias_folder_are_scored(tmp_path):
    folder = tmp_path / "pred/4096/pred"
    folder.mkdir(parents=True)
    (folder / "vt.jsonl").write_text(json.dumps({"index": 0, "pred": "AAAAA", "outputs": ["AAAAA", "BBBBB"]}) + "\n")
    (folder / "qa_1.jsonl").write_text(json.dumps({"index": 0, "pred": "x", "outputs": ["x", "y"]}) + "\n")
    task = Ruler(model="", predictions=str(tmp_path / "pred"))
    given = task.load_data()
    assert {(each.task, each.length, each.score) for each in given.scores} == {("vt", 4096, 0.5), ("qa_1", 4096, 1.0)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no answers to RULER"):
        Ruler(model="", predictions=str(tmp_path / "empty")).load_data()
