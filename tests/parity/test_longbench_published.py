"""Published answers of LongAlpaca-7B-16k score what was published, to the hundredth (LongLoRA, arXiv 2309.12307)."""

from __future__ import annotations

import json

import pytest
from conftest import SHARED

PREDICTIONS = SHARED / "longbench" / "predictions" / "longalpaca-7b-16k"
pytestmark = pytest.mark.skipif(not PREDICTIONS.is_dir(), reason="needs the published predictions beside the checkout")
# LongLoRA's table of LongBench: six categories and their mean
PUBLISHED = {
    "single": 28.7,
    "multi": 28.1,
    "summarization": 27.8,
    "few-shot": 63.7,
    "code": 56.0,
    "synthetic": 16.7,
    "average": 36.8,
}


@pytest.fixture(scope="module")
def expected():
    return json.loads((PREDICTIONS / "expected.json").read_text())


def scores(record):
    return {row["task"]: row["score"] for row in record["results"]}


def test_every_score_and_average(run, tmp_path, expected):
    args = ("eval", "longbench", "--predictions", PREDICTIONS, "-o", "out", "--fail-under", "english=36.8")
    result = run(*args)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert scores(record) == {task: entry["published"] for task, entry in expected.items()}
    assert {task: row["rows"] for task, row in expected.items()} == {
        row["task"]: row["num_rows"] for row in record["results"]
    }
    assert {key: round(value, 1) for key, value in record["averages"]["english"].items()} == PUBLISHED
    assert record["averages"]["chinese"]["average"] is None


def test_the_other_ratio_moves_code_by_what_python_levenshtein_does(run, expected):
    args = ("eval", "longbench", "--predictions", PREDICTIONS, "--tasks", "lcc,repobench-p", "--json", "-o", "out")
    result = run(*args, "--code-similarity", "levenshtein")
    assert result.exit_code == 0, result.output
    assert scores(json.loads(result.stdout)) == {task: expected[task]["levenshtein"] for task in ("lcc", "repobench-p")}


def test_a_bar_that_is_missed_is_named(run):
    args = ("eval", "longbench", "--predictions", PREDICTIONS, "--tasks", "trec,hotpotqa", "-o", "out")
    result = run(*args, "--fail-under", "trec=63.5", "--fail-under", "hotpotqa=37.02")
    assert result.exit_code == 1
    assert "hotpotqa is 37.01 (at least 37.02)" in result.stderr and "trec" not in result.stderr
