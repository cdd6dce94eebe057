"""`longext eval ruler` and its kin as a user types them."""

from __future__ import annotations

import json

import pytest
from command_line import fails, no_leftovers, ok, result_of


def test_ruler_ends_in_tables_pictures_and_record(run, tmp_path):
    args = ("--lengths", "400,1024", "--num-trials", 1, "--tasks", "niah_single_1,cwe", "--answers", "likelihood")
    out = ok(run("eval", "ruler", "books-5m", *args, "-o", "r"))
    for text in ("likelier", "chance", "left out, since no sample fits: cwe"):
        assert text in out
    record = result_of(tmp_path / "r")
    assert record["kind"] == "ruler"
    assert [(cell["task"], cell["length"]) for cell in record["ranked_by_task"]] == [
        ("niah_single_1", 400),
        ("niah_single_1", 1024),
        ("cwe", 1024),
    ]
    assert record["protocol"]["answers"] == "likelihood"
    no_leftovers(tmp_path, "r")


def test_answers_of_a_run_are_scored_again_without_a_model(run, tmp_path):
    args = ("--lengths", "300", "--num-trials", 2, "--tasks", "fwe", "-o", "r")
    ok(run("eval", "ruler", "books-5m", *args))
    path = tmp_path / "r/answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["answer"] = " ".join(rows[0]["expected"])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads(ok(run("eval", "ruler", "--predictions", "a.jsonl", "-o", "again", "--json")))
    assert record["by_task"][0]["score"] == pytest.approx(0.5)
    assert record["model"]["answers_from"] == "a.jsonl"


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("ruler", "books-5m", "--tasks", "vtt"), ("Unknown task 'vtt'", "Did you mean 'vt'")),
        (("ruler", "books-5m", "--lengths", "200", "--tasks", "vt"), ("RULER's vt does not fit 200 tokens",)),
        (("ruler", "books-5m", "--words", "words"), ("Unknown word list 'words'",)),
        (("ruler", "books-5m", "--squad", "nowhere.json"), ("--squad must be a file",)),
        (("ruler", "--predictions", "nowhere.jsonl"), ("--predictions must be a file",)),
        (("ruler", "--predictions", "x.jsonl", "--answers", "both"), ("leave --answers out",)),
        (("needle", "books-5m", "--answers", "rank"), ("Unknown way of answering 'rank'",)),
        (("mrcr", "books-5m", "--needles", "2,2"), ("--needles must be different",)),
        (("graphwalks", "books-5m", "--tasks", "dfs"), ("Unknown task 'dfs'",)),
        (("longbench2", "books-5m", "--data", "no.json"), ("--data must be a file of LongBench v2",)),
    ],
)
def test_wrong_flags_end_in_one_line(run, tmp_path, args, texts):
    fails(run("eval", *args, "-o", "n"), 2, *texts)
    no_leftovers(tmp_path)
