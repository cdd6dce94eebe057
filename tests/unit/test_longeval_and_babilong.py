"""LongEval and BABILong: cases, prompts and verdicts by hand; published answers to the digit."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from conftest import SHARED

from longext.errors import ConfigError, DataError
from longext.evals.suites import babilong, longeval
from longext.evals.suites.longeval import LONGEVAL_TASKS, LongEval, score_published
from longext.models.chat import uses_template

LINE = re.compile(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", re.MULTILINE)
ANSWERS = SHARED / "longeval/lines/predictions/longchat-13b-16k"


@pytest.mark.skipif(not ANSWERS.is_dir(), reason="no published answers here")
@pytest.mark.parametrize(("size", "accuracy"), [(200, 0.96), (300, 0.94)])
def test_published_answers_score_as_published(size, accuracy):
    found = score_published(ANSWERS / f"{size}_response.txt")
    assert sum(each.score for each in found.scores) / len(found.scores) == accuracy == found.facts["stated_accuracy"]
    assert {(each.task, each.length) for each in found.scores} == {("lines", size)}
    assert len(found.scores) == 50


@pytest.mark.skipif(not (SHARED / "longeval/topics").is_dir(), reason="no LongEval cases here")
def test_real_cases_are_read_and_have_the_form_that_is_generated():
    cases = longeval.read_cases(str(SHARED / "longeval"), ("lines", "topics"), (), 50)
    assert {(case.task, case.size) for case in cases} == {("lines", n) for n in (200, 300)} | {
        ("topics", n) for n in (5, 10)
    }
    assert len(cases) == 200
    for case in cases:
        if case.task == "lines":
            numbers = LINE.findall(case.prompt)
            assert len(numbers) == case.size
            assert (case.key, case.expected) in numbers
            made = longeval.generate_lines(case.size, 1, 0)[0]
            record = slice(made.prompt.index("\n\nline"), made.prompt.index("\n\nNow"))
            assert case.prompt[: record.start] == made.prompt[: record.start]
            assert case.prompt.endswith(made.prompt[record.stop :].replace(made.key, case.key))
        else:
            assert case.expected.lower() in case.prompt.lower()


def test_generated_lines_are_different_seeded_and_answerable():
    cases = longeval.generate_lines(80, 4, 7)
    assert cases == longeval.generate_lines(80, 4, 7)
    assert cases != longeval.generate_lines(80, 4, 8)
    for case in cases:
        numbers = dict(LINE.findall(case.prompt))
        assert len(numbers) == 80
        assert numbers[case.key] == case.expected
    assert len({case.prompt for case in cases}) == 4
    with pytest.raises(ConfigError, match="topics needs --data"):
        LongEval(model="m", tasks=("topics",)).load_data()


@pytest.mark.parametrize(
    ("task", "answer", "expected", "verdict"),
    [
        ("lines", "The <REGISTER_CONTENT> in line a-b is <123>.", "123", True),
        ("lines", "It is 123, not 124", "123", False),
        ("lines", "00123", "123", True),
        ("lines", "line 7 holds 123", "123", True),
        ("lines", "no idea", "123", False),
        ("lines", "", "123", False),
        ("topics", "The first topic was  the role of\nart in society.", "The role of art in society", True),
        ("topics", "Art.", "The role of art in society", False),
    ],
)
def test_the_last_integer_and_the_first_topic_count(task, answer, expected, verdict):
    assert LONGEVAL_TASKS[task].score(expected, answer) == verdict


def test_a_completion_begins_the_answer():
    (case,) = longeval.generate_lines(3, 1, 0)
    assert longeval.prompt_text(case, False) == case.prompt
    assert longeval.prompt_text(case, True).endswith(f"Line <{case.key}>: <REGISTER_CONTENT> is")


def test_topic_answers_in_lmsys_form_are_scored(tmp_path):
    path = tmp_path / "5_response.txt"
    path.write_text(
        "Label: The role of art, Predict: ['the role of art in life'], prompt length: 70\n"
        "Label: Sports, Predict: ['Art, Parsed'], prompt length: 71\n"
    )
    found = score_published(path)
    assert [(o.task, o.length, o.score, o.num_tokens) for o in found.scores] == [
        ("topics", 5, 1.0, 70),
        ("topics", 5, 0.0, 71),
    ]
    assert found.facts["stated_accuracy"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Label: 1, Predict: 1, Parsed: 1, prompt length: 5\nwhat\n", "a.txt:2 is no answer"),
        ("Label: x, Predict: 1, Parsed: 1, prompt length: 5\n", "a.txt:1 is no answer"),
        ("Accuracy: high\n", "a.txt:1 gives no accuracy"),
        ("\n", "holds no answer"),
    ],
)
def test_broken_answers_name_file_and_line(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        score_published(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("task", "answer", "question", "target", "verdict"),
    [
        ("qa1", "Mary is in the Bathroom.", "Where is Mary?", "bathroom", True),
        ("qa1", "bathroom or kitchen", "Where is Mary?", "bathroom", False),
        ("qa1", "bathroom. Not the kitchen.", "Where is Mary?", "bathroom", True),
        ("qa1", "the bathroom<context> kitchen", "Where is Mary?", "bathroom", True),
        ("qa1", "kitchen", "Where is Mary?", "bathroom", False),
        ("qa1", "", "Where is Mary?", "bathroom", False),
        ("qa3", "Before the garden it was in the kitchen", "Where was the milk before the garden?", "kitchen", True),
        ("qa5", "Fred gave it to Jeff", "Who did Fred give the football to?", "Jeff", True),
        ("qa5", "Fred gave the milk to Jeff", "Who did Fred give the football to?", "Jeff", False),
    ],
)
def test_babilong_verdicts(task, answer, question, target, verdict):
    row = babilong.BABILongRow("i", task, 0, "", question, target)
    assert babilong.share_right(row.task, row.question, row.target, answer) == verdict


def test_babilong_prompts_have_the_parts_that_were_asked_for():
    row = babilong.BABILongRow("i", "qa1", 0, " FACTS.\n", "Where is Mary? ", "garden")
    plain, instruction, examples = (babilong.prompt_text(row, kind) for kind in ("plain", "instruction", "examples"))
    assert plain == "<context>\nFACTS.\n</context>\n\nQuestion: Where is Mary?"
    assert instruction.endswith(plain)
    assert examples.endswith(plain)
    task = babilong.BABILONG_TASKS["qa1"]
    assert instruction == f"{task.instruction}\n\n{task.form}\n\n{plain}"  # the authors' template
    between = examples.removeprefix(f"{task.instruction}\n\n").removesuffix(f"\n\n{task.form}\n\n{plain}")
    assert re.fullmatch(r"(<example>\n[^<]+\nAnswer: [^<]+\n</example>\n?)+", between)
    assert instruction.count("<example>") == 0
    assert examples.count("<example>") == 2
    for task in babilong.BABILONG_TASKS:
        for facts, answer in babilong.BABILONG_TASKS[task].examples:
            names = {label for label in babilong.ROOMS if label in f"{facts} {answer}"}
            assert not names, "an example must not hold an answer"


def test_lengths_and_their_names():
    assert [babilong.parse_length(name) for name in ("0k", "4k", "1M", "qa1")] == [0, 4000, 1_000_000, None]
    assert [babilong.length_name(length) for length in (0, 4000, 128_000, 1_000_000)] == ["0k", "4k", "128k", "1M"]


@pytest.mark.skipif(not (SHARED / "babilong/0k").is_dir(), reason="no BABILong rows here")
def test_real_rows_can_be_right():
    rows = babilong.read_rows(str(SHARED / "babilong"), tuple(babilong.BABILONG_TASKS), (), None)
    assert len(rows) == 1500
    assert {row.length for row in rows} == {0, 1000, 4000}
    assert all(babilong.share_right(row.task, row.question, row.target, row.target) for row in rows)
    assert len({row.id for row in rows}) == 1500


def test_broken_rows_name_file_and_line(tmp_path):
    (tmp_path / "0k").mkdir()
    good = json.dumps({"input": "a", "question": "b", "target": "c"})
    for text, message in (
        (f"{good}\n{{", "qa1.jsonl:2 is not valid JSON"),
        (f'{good}\n\n{{"input": 1}}\n', "qa1.jsonl:3 is no row"),
        ("", "holds no row"),
    ):
        (tmp_path / "0k/qa1.jsonl").write_text(text)
        with pytest.raises(DataError, match=re.escape(message)):
            babilong.read_rows(str(tmp_path), ("qa1",), (), None)


def test_files_of_other_encodings_name_file_and_line(tmp_path):
    (tmp_path / "1_lines.jsonl").write_bytes(b"\n\xff\n")
    with pytest.raises(DataError, match=r"1_lines.jsonl:2 is not UTF-8 text"):
        longeval.read_cases(str(tmp_path), ("lines",), (), 50)
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    with pytest.raises(DataError, match=r"a.txt:1 is not UTF-8 text"):
        score_published(tmp_path / "a.txt")


def test_a_chat_model_is_asked_through_its_template(books):
    rows = [babilong.BABILongRow("i", "qa1", 0, "FACTS.", "Where is Mary? ", "garden")]
    task = babilong.BABILong(model="m", data="d", prompt="plain", max_new_tokens=1)
    plain = len(task.questions(books, rows)[0].input_ids)
    books.tokenizer.chat_template = "{{ bos_token }}USER: {{ messages[0]['content'] }} ASSISTANT:"
    asked = len(task.questions(books, rows)[0].input_ids)
    bare = len(books.encode(babilong.prompt_text(rows[0], "plain")))
    assert asked > bare + 4
    assert plain == len(books.encode(babilong.prompt_text(rows[0], "plain") + "\nAnswer:"))
    task = dataclasses.replace(task, chat_template=False)
    assert (
        len(task.questions(books, rows)[0].input_ids)
        == task.ask(books, task.questions(books, rows))[1]["i"].num_prompt_tokens
        == plain
    )
    assert uses_template(books, True) and uses_template(books, None) and not uses_template(books, False)
