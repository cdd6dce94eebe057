"""`longext eval longeval` and `longext eval babilong` as a user types them."""

from __future__ import annotations

import json

import pytest
from command_line import fails, no_leftovers, ok, result_of
from conftest import SHARED


@pytest.fixture
def facts(tmp_path):
    """A folder of BABILong rows."""
    for length in ("0k", "1k"):
        (tmp_path / "facts" / length).mkdir(parents=True)
        for task in ("qa1", "qa2"):
            row = {"input": "Mary went to the garden.", "question": "Where is Mary? ", "target": "garden"}
            (tmp_path / "facts" / length / f"{task}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    return tmp_path / "facts"


def test_generated_lines_end_in_table_picture_and_record(run, tmp_path):
    args = ("eval", "longeval", "books-5m", "--sizes", "3,5", "--num-cases", 2, "--complete", "-o", "e")
    out = ok(run(*args, "--method", "yarn", "--factor", 8))
    assert "Topics were not asked for" in out
    record = result_of(tmp_path / "e")
    assert (record["kind"], record["data"]["data"]) == ("longeval", "generated")
    assert [(cell["length"], cell["num_trials"]) for cell in record["results"]] == [(3, 2), (5, 2)]
    rows = [json.loads(line) for line in (tmp_path / "e/answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["lines/3/0", "lines/3/1", "lines/5/0", "lines/5/1"]
    assert all("\n" not in row["answer"] for row in rows)
    assert (tmp_path / "e/longeval.png").stat().st_size > 5000
    no_leftovers(tmp_path, "e")


def test_given_cases_of_lines_and_topics(run, tmp_path):
    (tmp_path / "cases").mkdir()
    line = {"prompt": "line a-b: REGISTER_CONTENT is <7>\n", "expected_number": 7, "random_idx": ["a-b", 0]}
    (tmp_path / "cases/1_lines.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "cases/2_topics.jsonl").write_text(json.dumps({"prompt": "Art.", "topics": ["Art", "Sea"]}) + "\n")
    args = ("eval", "longeval", "books-5m", "--data", "cases", "--memory", "window:128", "--segment", 64)
    record = json.loads(ok(run(*args, "--complete", "--json", "-o", "e")))
    assert [(cell["task"], cell["length"]) for cell in record["results"]] == [("lines", 1), ("topics", 2)]


@pytest.mark.skipif(not (SHARED / "longeval/lines").is_dir(), reason="no published answers here")
def test_published_answers_are_scored_without_a_model(run, tmp_path):
    path = SHARED / "longeval/lines/predictions/longchat-13b-16k/200_response.txt"
    out = ok(run("eval", "longeval", "--predictions", path, "-o", "e"))
    assert "96%" in out
    assert "states an accuracy of 0.96" in out
    record = result_of(tmp_path / "e")
    assert record["results"][0]["score"] == record["stated_accuracy"] == 0.96
    assert record["results"][0]["num_trials"] == 50


def test_babilong_ends_in_table_picture_and_record(run, tmp_path, facts):
    args = ("eval", "babilong", "books-5m", "--data", "facts", "--tasks", "qa1,qa2", "--num-cases", 2)
    out = ok(run(*args, "--max-new-tokens", 4, "-o", "b"))
    for text in ("0k", "1k", "qa2", "all"):
        assert text in out
    record = result_of(tmp_path / "b")
    assert (record["kind"], record["protocol"]["chat_template"]) == ("babilong", False)
    assert [(cell["task"], cell["length"], cell["num_trials"]) for cell in record["results"]] == [
        ("qa1", 0, 2),
        ("qa1", 1000, 2),
        ("qa2", 0, 2),
        ("qa2", 1000, 2),
    ]
    assert (tmp_path / "b/babilong.png").stat().st_size > 5000
    no_leftovers(tmp_path, "b", "facts")


def test_a_written_recipe_makes_the_result_again(run, tmp_path, facts):
    args = ("eval", "babilong", "books-5m", "--data", "facts", "--tasks", "qa1", "--lengths", "1k", "--num-cases", 1)
    first = json.loads(ok(run(*args, "--max-new-tokens", 4, "-o", "b", "--json")))
    second = json.loads(ok(run("eval", "babilong", "-c", "b/recipe.yaml", "-o", "c", "--json")))
    assert second["results"] == first["results"]
    assert second["data"]["sha256"] == first["data"]["sha256"]


def test_prompts_longer_than_the_model_are_pointed_out(run, tmp_path):
    args = ("eval", "longeval", "books-5m", "--sizes", "3,40", "--num-cases", 1, "--complete")
    assert "1 of 2 prompts are longer than the model's 512 positions" in ok(run(*args))
    extended = ok(run(*args, "--method", "dynamic", "--factor", 8, "--force"))
    assert "positions" not in extended  # its config keeps the trained length


def test_answers_of_another_run_are_not_taken_up(run, tmp_path, facts):
    (tmp_path / "b.predictions.jsonl").write_text('{"schema": "longext.predictions/1", "fingerprint": "0"}\n{}\n')
    args = ("eval", "babilong", "books-5m", "--data", "facts", "--tasks", "qa1", "-o", "b")
    message = fails(run(*args), 2, "b.predictions.jsonl", "another -o")
    assert "goes on" not in message
    assert "are not used" in message
    no_leftovers(tmp_path, "b.predictions.jsonl", "facts")


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--tasks", "line"), ("Unknown task 'line'", "Did you mean 'lines'")),
        (("--tasks", "topics"), ("--tasks topics needs --data",)),
        (("--data", "nowhere"), ("--data must be a folder", "nowhere")),
        (("--data", "facts"), ("No cases", "found there: none")),
        (("--data", "cases", "--sizes", "4"), ("No cases of 4", "1_lines.jsonl")),
        (("--data", "cases"), ("1_lines.jsonl:2", "expected_number")),
        (("--sizes", "0"), ("`sizes` must be >= 1",)),
        (("--num-cases", 0), ("`num_cases` must be >= 1",)),
        (("--predictions", "nowhere.txt"), ("--predictions must be a file", "nowhere.txt")),
        (("--chat-template",), ("books-5m has no chat template", "leave --chat-template out")),
        (("--chat-template", "--complete"), ("--complete is for models that only continue", "leave one out")),
    ],
)
def test_wrong_longeval_flags_end_in_one_line(run, tmp_path, facts, args, texts):
    (tmp_path / "cases").mkdir()
    line = {"prompt": "p", "expected_number": 7, "random_idx": ["a-b", 0]}
    (tmp_path / "cases/1_lines.jsonl").write_text(json.dumps(line) + '\n{"prompt": "p"}\n')
    fails(run("eval", "longeval", "books-5m", "-o", "e", *args), 2, *texts)
    no_leftovers(tmp_path, "cases", "facts")


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--tasks", "qa11"), ("Unknown task 'qa11'", "Did you mean 'qa1'")),
        (("--tasks", "qa3"), ("qa3.jsonl", "Tasks there: qa1, qa2")),
        (("--tasks", "qa1", "--lengths", "2k"), ("No length '2k'", "0k, 1k")),
        (("--tasks", "qa1", "--data", ""), ("--data must be a folder",)),
        (("--tasks", "qa1", "--data", "."), ("No folder named after a length",)),
        (("--prompt", "example"), ("Unknown prompt 'example'", "Did you mean 'examples'")),
        (("--max-new-tokens", 0), ("`max_new_tokens` must be >= 1",)),
        (("--tasks", "qa1", "--chat-template"), ("books-5m has no chat template",)),
    ],
)
def test_wrong_babilong_flags_end_in_one_line(run, tmp_path, facts, args, texts):
    fails(run("eval", "babilong", "books-5m", "--data", "facts", "-o", "b", *args), 2, *texts)
    no_leftovers(tmp_path, "facts")
