"""Answers that a run wrote, scored again by --predictions: the same record, and no model."""

from __future__ import annotations

import json
import random

import pytest

from longext.errors import ConfigError, DataError
from longext.evals.base import make_eval
from longext.evals.retrieval import begins_with
from longext.evals.runner import run_eval
from longext.evals.suites.effective import STEP, longest_search, search_lengths


def written(measured, folder):
    path = folder / "answers.jsonl"
    path.write_text(measured.files["answers.jsonl"])
    return str(path)


def scored(record, *left_out):
    return {key: value for key, value in record.items() if key not in ("command", "model", "data", "cost", *left_out)}


@pytest.mark.parametrize("protocol", ["landmark", "longlora", "yarn"])
def test_answers_to_passkeys(books, tmp_path, protocol):
    settings = {"protocol": protocol, "lengths": (300, 640), "num_trials": 1, "depths": (0.0, 1.0)}
    settings["fail_under"] = ("300=1",)
    run = run_eval(make_eval("passkey", "books-5m", **settings), books)
    assert {row["accuracy"] for row in run.record["by_length"]} >= {1.0}, "some are right"
    given = run_eval(make_eval("passkey", "", predictions=written(run, tmp_path), **settings)).record
    assert given["model"] == {"id": None, "answers_from": str(tmp_path / "answers.jsonl")}
    assert given["protocol"].pop("prompts_sha256") is None and run.record["protocol"].pop("prompts_sha256")
    assert scored(given) == scored(run.record, "seconds")
    lines = [json.loads(line) for line in run.files["answers.jsonl"].splitlines()]
    assert all(line["score"] == 1 or line["expected"][0] not in line["answer"] for line in lines)


@pytest.mark.parametrize("test", ["passkey", "needle"])
def test_answers_to_a_search(books, tmp_path, test):
    settings = {"test": test, "num_trials": 1, "depths": (0.0, 1.0), "min_length": 256, "max_length": 640}
    costs = []
    run = run_eval(make_eval("effective", "books-5m", **settings), books, tell_cost=costs.append)
    (cost,) = costs
    assert cost.is_most and cost.num_read_tokens >= sum(2 * (row["length"] - 16) for row in run.record["results"])
    assert run.record["cost"]["is_most"] is True
    file = written(run, tmp_path)
    given = run_eval(make_eval("effective", "", predictions=file, **settings)).record
    for row in run.record["results"]:
        row["seconds"] = None
    run.record["protocol"] = {key: run.record["protocol"][key] for key in given["protocol"]} | {"chat_template": None}
    assert scored(given) == scored(run.record)
    short = run_eval(
        make_eval("effective", "", predictions=file, test=test)
    ).record  # the lengths are those of the file
    assert short["effective_length"] == given["effective_length"]
    assert short["protocol"]["depths"] == [0.0, 1.0] and short["protocol"]["num_trials"] == 1


@pytest.mark.parametrize(("minimum", "maximum"), [(64, 64), (128, 192), (128, 2112), (64, 1024), (192, 1984)])
def test_no_search_reads_more_than_the_longest(minimum, maximum):
    most = sum(longest_search(minimum, maximum))
    for seed in range(300):
        passes = random.Random(seed)
        tried = search_lengths(lambda n, rng=passes: [rng.random() < 0.7], minimum=minimum, maximum=maximum, limit=0.5)
        assert sum(row.length for row in tried) <= most
        assert all(row.length % STEP == 0 for row in tried)


@pytest.mark.parametrize(
    ("answer", "right"), [("123", 1), (" 123. And", 1), ("1234", 0), ("12", 0), ("", 0), ("x 123", 0)]
)
def test_an_answer_begins_with_a_word(answer, right):
    assert begins_with(answer, "123") == right


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("passkey", {"answers": "both"}, ConfigError, "leave --answers out"),
        ("passkey", {"error_rate": 0.05, "fail_under": ("0.5",)}, ConfigError, "--predictions has the answers"),
        ("passkey", {"fail_under": ("512=0.5",)}, ConfigError, "512 is not measured"),
        ("effective", {"error_rate": 0.05}, ConfigError, "--predictions has the answers"),
        ("needle", {"scoring": "exact"}, ConfigError, "score --predictions by match"),
        ("reconstruction", {}, DataError, "no text under 'content'"),
    ],
)
def test_what_does_not_go_with_given_answers(tmp_path, name, settings, error, message):
    line = {"task": "passkey", "length": 64, "depth": 0.5, "expected": ["1"], "answer": "1"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(error, match=message):
        run_eval(make_eval(name, "", predictions=str(tmp_path / "a.jsonl"), **settings))


@pytest.mark.parametrize(
    ("name", "settings", "changes", "message"),
    [
        ("passkey", {}, {"expected": ["1", "2"]}, "a.jsonl:1 is no answer to one key: it has 2 texts"),
        ("effective", {}, {"expected": ["1", "2"]}, "a.jsonl:1 is no answer to one key: it has 2 texts"),
        ("passkey", {}, {}, "a.jsonl:2 has the id 'a' of an earlier line"),
        ("needle", {}, {}, "a.jsonl:2 has the id 'a' of an earlier line"),
    ],
)
def test_answers_of_two_runs_or_to_several_keys_are_refused(tmp_path, name, settings, changes, message):
    line = {"id": "a", "task": "passkey", "length": 64, "depth": 0.5, "expected": ["1"], "answer": "1", **changes}
    (tmp_path / "a.jsonl").write_text(2 * f"{json.dumps(line)}\n")
    with pytest.raises(DataError, match=message):
        run_eval(make_eval(name, "", predictions=str(tmp_path / "a.jsonl"), **settings))


@pytest.mark.parametrize(("expected", "answer", "right"), [("17", "is 017.", 1), ("a", "1", 0), ("1", "1" * 5000, 0)])
def test_any_text_can_be_rated_as_a_number(tmp_path, expected, answer, right):
    line = {"task": "passkey", "length": 64, "depth": None, "expected": [expected], "answer": answer}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    task = make_eval("passkey", "", predictions=str(tmp_path / "a.jsonl"), protocol="yarn")
    assert run_eval(task).record["by_length"][0]["num_correct"] == right


def test_more_than_was_asked_for_is_no_exact_match(tmp_path):
    line = {"content": "text", "ratio": 8, "expected": "a b", "answer": "a b c"}
    (tmp_path / "a.jsonl").write_text(json.dumps({**line, "expected_tokens": [1, 2], "answer_tokens": [1, 2, 3]}))
    (row,) = run_eval(make_eval("reconstruction", "", predictions=str(tmp_path / "a.jsonl"))).record["results"]
    assert [row["metrics"][name]["mean"] for name in ("exact_prefix", "exact_match")] == [1, 0]


def test_a_search_reached_no_further_than_its_record_says(tmp_path):
    line = {"task": "passkey", "length": 640, "depth": 0.5, "expected": ["1"], "answer": "1"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    record = run_eval(make_eval("effective", "", predictions=str(tmp_path / "a.jsonl"), max_length=512)).record
    assert record["effective_length"] == record["protocol"]["max_length"] == 640


def test_a_line_of_another_form_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"task": "passkey", "answer": "1"}')
    for name in ("passkey", "effective"):
        with pytest.raises(DataError, match=r"a.jsonl:1 is no answer: no list of texts under 'expected'"):
            run_eval(make_eval(name, "", predictions=str(tmp_path / "a.jsonl")))
        with pytest.raises(ConfigError, match="must be a file of answers"):
            run_eval(make_eval(name, "", predictions=str(tmp_path / "b.jsonl")))
    line = {"content": "text", "ratio": 8, "expected": "a b", "answer": "a", "expected_tokens": [1, 2]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match="lists of them or both left out"):
        run_eval(make_eval("reconstruction", "", predictions=str(tmp_path / "a.jsonl")))
    (tmp_path / "a.jsonl").write_text(json.dumps({**line, "expected_tokens": None}))
    (row,) = run_eval(make_eval("reconstruction", "", predictions=str(tmp_path / "a.jsonl"))).record["results"]
    assert set(row["metrics"]) == {"bleu", "sentence_bleu", "rouge_l"} and row["num_tokens"] is None


def lines_of(tmp_path, *lines):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def test_settings_choose_among_given_answers_and_the_record_is_of_those(tmp_path):
    given = lines_of(
        tmp_path,
        *(
            {"task": task, "length": length, "expected": ["one"], "answer": answer}
            for task, length, answer in (("single", 64, "one"), ("single", 64, "one"), ("multikey", 128, "two"))
        ),
    )
    every = run_eval(make_eval("needle", "", predictions=given)).record
    assert list(every["protocol"]["tasks"]) == ["single", "multikey"]
    (note,) = every["notes"]
    assert note.startswith("The file does not say how its prompts were made; as this command has it: scoring, haystack")
    for settings in ({"tasks": ("single",)}, {"lengths": (64,)}):
        task = make_eval("needle", "", predictions=given, **settings, fail_under=("1",))
        record = run_eval(task).record
        assert [row["task"] for row in record["results"]] == list(record["protocol"]["tasks"]) == ["single"]
        assert record["bars"][0]["passed"]
    with pytest.raises(DataError, match="has no answer of --lengths 96"):
        run_eval(make_eval("needle", "", predictions=given, lengths=(96,)))
    with pytest.raises(ConfigError, match="Unknown task 'single'"):
        run_eval(make_eval("nolit", "", predictions=given))
    with pytest.raises(ConfigError, match="--limit is of the rows that are asked"):
        run_eval(make_eval("longbench2", "", predictions=given, limit=1))


@pytest.mark.parametrize(
    ("name", "task", "expected", "answer", "found"),
    [
        ("longeval", "lines", ["17"], "017, " + "1" * 5000, 0),
        ("longeval", "lines", ["17"], "1, 017", 1),
        ("infinitebench", "math_calc", ["[10, 2]"], "10 " + "2" * 5000, 0.5),
        ("longeval", "lines", ["x"], "1", None),
        ("mrcr", "2 needles", ["a"], "a", None),
        ("infinitebench", "code_debug", ["3"], "a", None),
        ("infinitebench", "math_calc", ["[]"], "1", None),
        ("infinitebench", "passkey", ["a b"], "1", None),
    ],
)
def test_what_is_expected_has_a_form_and_numbers_any_length(tmp_path, name, task, expected, answer, found):
    given = lines_of(tmp_path, {"task": task, "length": 0, "expected": expected, "answer": answer})
    if found is None:
        with pytest.raises(DataError, match=rf"a.jsonl:1 is no answer to {task}: what is expected is of another form"):
            run_eval(make_eval(name, "", predictions=given))
    else:
        assert run_eval(make_eval(name, "", predictions=given)).record["results"][0]["score"] == found
