"""`longext eval longbench` as a user types it, on a folder of small rows made here."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from command_line import fails, fails_in_one_line
from longbench_data import TASKS, write_data


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def answers(directory):
    return {file.name: file.read_bytes() for file in sorted((directory / "predictions").iterdir())}


ARGS = ("eval", "longbench", "books-5m", "--device", "cpu", "--max-length", 120)


def test_tables_answers_and_picture(run, tmp_path, data):
    result = run(*ARGS, "--data", data, "-o", "out")
    assert result.exit_code == 0, result.output
    for text in ("hotpotqa", "LongBench by task", "has no file for narrativeqa", "not comparable"):
        assert text in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["longbench.png", "predictions", "recipe.yaml", "result.json", "run.json", "table.md"]
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["kind"] == "longbench"
    assert record["protocol"]["id"] == "longbench-official"
    assert record["protocol"]["max_length"] == 120 and record["protocol"]["chat_template"] is False
    assert [row["task"] for row in record["results"]] == ["hotpotqa", "trec", "samsum", "passage_count", "lcc"]
    assert all(row["num_truncated"] >= 1 for row in record["results"] if row["task"] != "passage_count")
    assert record["averages"]["english"]["average"] is None
    predictions = rows_of(tmp_path / "out/predictions/trec.jsonl")
    assert predictions[0]["answers"] == ["Location"] and predictions[0]["all_classes"] == ["Location", "Person"]
    assert (tmp_path / "out/longbench.png").stat().st_size > 10_000
    # the answers, scored again as someone else's, score the same
    again = run("eval", "longbench", "--predictions", "out/predictions", "--data", data, "--json", "-o", "again")
    assert again.exit_code == 0, again.output
    rescored = json.loads(again.stdout)
    assert [row["score"] for row in rescored["results"]] == [row["score"] for row in record["results"]]


def test_the_first_answer_is_that_of_greedy(run, tmp_path, data, books):
    from longext.evals.longbench.tasks import fill_prompt, read_prompt

    assert run(*ARGS, "--data", data, "--tasks", "hotpotqa", "--limit", 1, "-o", "out").exit_code == 0
    row = rows_of(data / "hotpotqa.jsonl")[0]
    ids = books.encode(fill_prompt(read_prompt("hotpotqa"), row["context"], row["input"]))
    ids = books.encode(books.decode(ids[:60]) + books.decode(ids[-60:])) if len(ids) > 120 else ids
    (prediction,) = rows_of(tmp_path / "out/predictions/hotpotqa.jsonl")
    assert prediction["pred"] == books.decode(books.greedy(ids, 32))
    assert prediction["num_prompt_tokens"] == len(ids)


def test_longbench_e_and_batches(run, tmp_path):
    data = write_data(tmp_path / "data", {"hotpotqa": TASKS["hotpotqa"]}, "_e")
    args = (*ARGS, "--data", data, "--e", "--tasks", "hotpotqa")
    assert run(*args, "-o", "one", "--batch-tokens", 1).exit_code == 0
    assert run(*args, "-o", "many", "--batch-tokens", 4000).exit_code == 0
    assert answers(tmp_path / "one") == answers(tmp_path / "many")
    record = json.loads((tmp_path / "one/result.json").read_text())
    assert record["protocol"]["id"] == "longbench-e-official"
    assert list(record["results"][0]["buckets"]) == ["0-4k", "4-8k", "8k+"]
    assert record["results"][0]["buckets"]["8k+"] is None  # no row is that long
    assert record["averages"]["0-4k"]["english"]["average"] is None


def test_with_a_memory(run, tmp_path, data):
    args = ("eval", "longbench", "books-5m", "--data", data, "--tasks", "hotpotqa", "--limit", 1)
    result = run(*args, "--memory", "window:128", "--segment", 64, "-o", "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["protocol"]["max_length"] is None and record["results"][0]["num_truncated"] == 0
    assert record["model"]["memory"]["spec"] == "window:128"


# --- a run that was cut off -------------------------------------------------------------------------------------------


def command(*args):
    return [sys.executable, "-m", "longext", *map(str, args)]


def _num_answers(file):
    """Return the answers behind the header, not counting the row of the speed that was measured."""
    lines = file.read_bytes().split(b"\n")[1:-1]
    return sum(not line.startswith(b'{"id": "(pace)"') for line in lines)


def wait_for_answers(work, process, seconds=120):
    """Wait until some prompts are answered and others are not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        if any(_num_answers(file) for file in work.glob("*.jsonl")):
            return
        time.sleep(0.01)


@pytest.fixture
def many(tmp_path):
    return write_data(tmp_path / "data", {name: rows * 4 for name, rows in TASKS.items()})


def test_resume_after_kill_equals_the_uninterrupted_run(run, tmp_path, many):
    args = (*ARGS, "--data", many, "--tasks", "hotpotqa,trec")
    assert run(*args, "-o", "whole").exit_code == 0
    process = subprocess.Popen(
        command(*args, "-o", "cut"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_answers(tmp_path / "cut.predictions", process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "cut").exists()
    first = tmp_path / "cut.predictions/hotpotqa.jsonl"
    known = sum(_num_answers(file) for file in first.parent.glob("*.jsonl"))
    with first.open("ab") as file:
        file.write(b'{"id": "hotpotqa:99", "te')  # a write that was cut off
    fails(run(*args, "-o", "cut", "--max-length", 100), 2, "other prompts or of another model")
    result = run(*args, "-o", "cut", "--resume")
    assert result.exit_code == 0, result.output
    assert known
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")
    records = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("cut", "whole")]
    assert records[0]["results"] == records[1]["results"]
    assert not list(tmp_path.glob("*.predictions"))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--data", "nowhere"), ("No folder 'nowhere'", "data.zip", "--data")),
        (("--data", "data", "--tasks", "hotpot"), ("Unknown task 'hotpot'", "Did you mean 'hotpotqa'")),
        (("--data", "data", "--tasks", "qasper"), ("data has no qasper.jsonl", "data.zip", "THUDM/LongBench")),
        (("--data", "data", "--e", "--tasks", "lcc"), ("data has no lcc_e.jsonl",)),
        (("--data", "data", "--tasks", "musique", "--e"), ("LongBench-E has no task 'musique'",)),
        (("--data", "data", "--max-length", 1), ("`max_length` must be >= 2",)),
        (("--data", "data", "--limit", 0), ("`limit` must be >= 1",)),
        (("--data", "data", "--resume", "-o", "new"), ("Nothing to resume", "new.predictions")),
        (("--data", "data", "--backend", "lm-eval"), ("longext eval harness MODEL --tasks longbench_",)),
        (("--data", "data", "--fail-under", "lcc"), ("TASK=SCORE",)),
        (("--data", "data", "--memory", "windoww"), ("Did you mean 'window'",)),
    ],
)
def test_bad_settings_end_in_one_line(run, tmp_path, data, args, texts):
    fails_in_one_line(run(*ARGS, *args), 2, *texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_bad_models_and_rows_end_in_one_line(run, tmp_path, data):
    args = ("--data", data, "-o", "out")
    fails_in_one_line(run("eval", "longbench", *args), 2, "Missing: model")
    fails_in_one_line(run("eval", "longbench", "books5m", *args), 2, "Did you mean 'books-5m'")
    (data / "lcc.jsonl").write_text((data / "lcc.jsonl").read_text() + "{broken\n")
    fails_in_one_line(run(*ARGS, *args), 2, "lcc.jsonl, line 3 is not valid JSON")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_given_answers_that_are_missing_or_empty_are_said_and_score_zero(run, tmp_path, data):
    folder = tmp_path / "pred"
    folder.mkdir()
    lines = [{"pred": "the girl", "answers": ["a girl", "the girl"], "all_classes": None, "length": 5}] * 2
    lines[1] = {**lines[1], "pred": ""}
    (folder / "hotpotqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ("eval", "longbench", "--predictions", folder)
    result = run(*args, "--data", data, "-o", "out")
    assert result.exit_code == 0, result.output
    assert f"no answer in {folder}: 1 of the 3 of hotpotqa (scored 0)" in result.stdout
    assert f"an empty answer in {folder}: 1 of the 3 of hotpotqa" in result.stdout
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["results"][0]["score"] == 33.33 and record["results"][0]["num_missing"] == 1
    without = run(*args, "--json", "-o", "without")
    assert json.loads(without.stdout)["results"][0]["score"] == 50.0  # over the answers there are
    fails_in_one_line(run(*args, "--tasks", "qasper"), 2, "pred has no qasper.jsonl")
    (folder / "hotpotqa.jsonl").write_text(json.dumps({**lines[0], "answers": ["another"]}) + "\n")
    fails_in_one_line(
        run(*args, "--data", data), 2, "1 of 1 predictions for hotpotqa are for rows that", "does not have"
    )
    (folder / "hotpotqa.jsonl").write_text('{"answers": ["a"]}\n')
    fails_in_one_line(run(*args), 2, "hotpotqa.jsonl, line 1: no text under 'pred'")
    (folder / "hotpotqa.jsonl").write_text("{\n")
    fails_in_one_line(run(*args), 2, "hotpotqa.jsonl, line 1 is not valid JSON")
    (folder / "hotpotqa.jsonl").write_text("")
    fails_in_one_line(run(*args), 2, "hotpotqa.jsonl has no predictions")
    (folder / "hotpotqa.jsonl").unlink()
    fails_in_one_line(run(*args), 2, "no file named after a task")
    fails_in_one_line(run("eval", "longbench", "--predictions", "nowhere"), 2, "--predictions nowhere is no folder")
