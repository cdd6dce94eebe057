"""CI mode: results are written, then a missed bar ends the command with 1 and one line."""

from __future__ import annotations

import json

import pytest
from command_line import fails, no_leftovers, ok, result_of
from harness_tasks import STORY, harness, write_task

pytestmark = pytest.mark.usefixtures("no_pictures")
BOOKS = "books-5m"
PPL = ("--lengths", "64,128", "--stride", 32, "--max-tokens", 300, "--num-bootstrap", 5)
PASSKEY = ("--lengths", "128,192", "--num-trials", 2, "--depths", 0)
NEEDLE = ("--lengths", "256,300", "--num-trials", 2, "--tasks", "single", "--scoring", "exact", "--haystack", "noise")
EFFECTIVE = ("--num-trials", 1, "--depths", 0, "--max-length", 128)
LONGEVAL = ("--sizes", "2,3", "--num-cases", 1, "--complete")
MEMORY = ("--memory", "window:64", "--segment", 32, "--lengths", "0,32", "--num-places", 2, "--num-bootstrap", 5)


@pytest.fixture
def facts(tmp_path):
    row = {"input": "Mary went to the garden.", "question": "Where is Mary? ", "target": "garden"}
    for length in ("0k", "1k"):
        (tmp_path / "facts" / length).mkdir(parents=True)
        (tmp_path / "facts" / length / "qa1.jsonl").write_text(json.dumps(row) + "\n")
    return ("--data", "facts", "--tasks", "qa1", "--max-new-tokens", 2)


def missed(result, *names):
    """It ended with 1, and its last line names exactly what was missed."""
    assert result.exit_code == 1, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("longext: Missed --fail-"), last
    told = [part.strip().split(" is ")[0] for part in last.partition(": Missed ")[2].partition(":")[2].split(";")]
    assert told == list(names)


def test_passkey_and_its_record(run, tmp_path):
    bars = ("--fail-under", "0", "--fail-under", "192=0")
    record = json.loads(ok(run("passkey", BOOKS, *PASSKEY, *bars, "--json", "-o", "p")))
    by_length = {row["length"]: row["accuracy"] for row in record["by_length"]}
    assert record["bars"] == [
        {"name": "all", "rule": "at least", "limit": 0, "value": sum(by_length.values()) / 2, "passed": True},
        {"name": "192", "rule": "at least", "limit": 0, "value": by_length[192], "passed": True},
    ]
    hard = (*PASSKEY, "--num-digits", 12, "--filler", "book", "--method", "linear", "--factor", 64)
    missed(run("passkey", BOOKS, *hard, "--fail-under", "1", "--fail-under", "128=1", "-o", "q"), "all", "128")
    assert [row["passed"] for row in result_of(tmp_path / "q")["bars"]] == [False, False]


def test_needle(run, tmp_path):
    bars = ("--fail-under", "single@256=0", "--fail-under", "single=1", "--fail-under", "300=1")
    missed(
        run("eval", "needle", BOOKS, *NEEDLE, "--method", "linear", "--factor", 64, *bars, "-o", "n"), "single", "300"
    )
    record = result_of(tmp_path / "n")
    assert [row["passed"] for row in record["bars"]] == [True, False, False]
    assert record["bars"][2]["value"] == record["by_length"][1]["score"]


def test_a_missed_bar_keeps_no_answers_of_the_run(run, tmp_path, facts):
    missed(run("eval", "babilong", BOOKS, *facts, "--fail-under", "qa1@1k=1", "-o", "b"), "qa1@1k")
    assert result_of(tmp_path / "b")["bars"][0]["name"] == "qa1@1k"
    no_leftovers(tmp_path, "b", "facts")


def test_longeval_generated_and_published(run, tmp_path):
    missed(run("eval", "longeval", BOOKS, *LONGEVAL, "--fail-under", "lines@3=1", "-o", "e"), "lines@3")
    assert len(result_of(tmp_path / "e")["bars"]) == 1
    (tmp_path / "7_response.txt").write_text(
        "Label: 4, Predict: 4, Parsed: 4, prompt length: 9\nLabel: 5, Predict: 6, Parsed: 6, prompt length: 9\n"
    )
    args = ("eval", "longeval", "--predictions", "7_response.txt")
    ok(run(*args, "--fail-under", "lines@7=0.5", "-o", "x"))
    missed(run(*args, "--fail-under", "0.51", "-o", "y"), "all")
    fails(run(*args, "--fail-under", "lines@8=0.5"), 2, "8 is not measured. Measured: 7.")


def test_effective_length(run, tmp_path):
    args = ("eval", "effective", BOOKS, *EFFECTIVE, "--method", "linear", "--factor", 64)
    missed(run(*args, "--fail-under", 128, "-o", "e"), "effective length")
    assert result_of(tmp_path / "e")["bars"] == [
        {"name": "effective length", "rule": "at least", "limit": 128, "value": 0, "passed": False}
    ]
    assert ok(run("eval", "effective", BOOKS, *EFFECTIVE, "--bar", 0.01, "--seed", 1, "--json"))


def test_perplexity_has_an_upper_bar(run, tmp_path):
    record = json.loads(ok(run("eval", "ppl", BOOKS, *PPL, "--fail-over", "128=10000", "--json", "-o", "a")))
    (bar,) = record["bars"]
    assert (bar["rule"], bar["value"], bar["passed"]) == ("at most", record["results"][1]["ppl"], True)
    result = run("eval", "ppl", BOOKS, *PPL, "--fail-over", "64=2", "--fail-over", "128=10000", "-o", "b")
    missed(result, "64")
    assert "(at most 2)" in result.stderr
    again = run("eval", "ppl", "-c", "b/recipe.yaml", "-o", "c")  # the recipe holds the bars
    missed(again, "64")


def test_perplexity_through_a_memory(run, tmp_path):
    missed(run("eval", "ppl", BOOKS, *MEMORY, "--fail-over", "0=1e9", "--fail-over", "32=1.5", "-o", "m"), "32")
    record = result_of(tmp_path / "m")
    own = {row["length"]: row["ppl"] for row in record["results"] if row["method"] == "memory"}
    assert [row["value"] for row in record["bars"]] == [own[0], own[32]]


def test_short_holds_its_tolerance_as_bars(run, tmp_path):
    args = ("eval", "short", BOOKS, "--lengths", "64", "--max-tokens", 300, "--num-bootstrap", 5)
    fails(run(*args, "--method", "linear", "--factor", 8, "-o", "s"), 1, "FAILED")
    (bar,) = result_of(tmp_path / "s")["bars"]
    assert (bar["name"], bar["rule"], bar["limit"], bar["passed"]) == ("change at 64", "at most", 0.02, False)


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("passkey", "none", *PASSKEY, "--fail-under", "90"), ("share of 0 to 1", "0.9 for 90%", "'90'")),
        (("passkey", "none", *PASSKEY, "--fail-under", "64=0.5"), ("64 is not measured. Measured: 128, 192.",)),
        (("passkey", "none", *PASSKEY, "--fail-under", "128=high"), ("SCORE or LENGTH=SCORE",)),
        (("eval", "needle", "none", *NEEDLE, "--fail-under", "singel=1"), ("Did you mean 'single'",)),
        (("eval", "needle", "none", *NEEDLE, "--fail-under", "single@64=1"), ("64 is not measured", "256, 300")),
        (("eval", "needle", "none", *NEEDLE, "--fail-under", "=1"), ("TASK@LENGTH=SCORE",)),
        (("eval", "longeval", "none", *LONGEVAL, "--fail-under", "lines@5=1"), ("Measured: 2, 3.",)),
        (("eval", "longeval", "none", *LONGEVAL, "--fail-under", "topics=1"), ("unknown task 'topics'", "lines")),
        (("eval", "effective", "none", *EFFECTIVE, "--fail-under", 256), ("1 to 128 (--max-length)", "256")),
        (("eval", "effective", "none", *EFFECTIVE, "--fail-under", 0), ("1 to 128",)),
        (("eval", "ppl", "none", *PPL, "--fail-over", "256=40"), ("256 is not measured. Measured: 64, 128.",)),
        (("eval", "ppl", "none", *PPL, "--fail-over", "40"), ("--fail-over takes LENGTH=PPL", "1 or more")),
        (("eval", "ppl", "none", *PPL, "--fail-over", "64=0.5"), ("a perplexity of 1 or more",)),
        (
            ("eval", "ppl", "none", *PPL, "--fail-over", "64=40", "--protocol", "positional"),
            ("--protocol positional",),
        ),
        (("eval", "ppl", "none", *MEMORY, "--fail-over", "64=40"), ("64 is not measured. Measured: 0, 32.",)),
    ],
    ids=lambda value: " ".join(map(str, value[:2])),
)
def test_wrong_bars_are_told_before_a_model_is_opened(run, tmp_path, args, texts):
    fails(run(*args), 2, *texts)  # there is no model of that name: it would be another message
    no_leftovers(tmp_path)


def test_wrong_bars_on_given_rows_are_told_before_a_model_is_opened(run, tmp_path, facts):
    args = ("eval", "babilong", "none", *facts)
    fails(run(*args, "--fail-under", "4k=0.5"), 2, "4k is not measured. Measured: 0k, 1k.")
    fails(run(*args, "--fail-under", "qa2=0.5"), 2, "unknown task 'qa2'", "Did you mean 'qa1'")


def test_longbench(run, tmp_path):
    (tmp_path / "pred").mkdir()
    rows = [{"pred": text, "answers": ["sea"], "all_classes": None, "length": 5} for text in ("sea", "hill")]
    (tmp_path / "pred/hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("eval", "longbench", "--predictions", "pred")
    ok(run(*args, "--fail-under", "hotpotqa=50", "-o", "a"))
    missed(run(*args, "--fail-under", "hotpotqa=50.01", "-o", "b"), "hotpotqa")
    assert result_of(tmp_path / "b")["bars"] == [
        {"name": "hotpotqa", "rule": "at least", "limit": 50.01, "value": 50.0, "passed": False}
    ]
    fails(run(*args, "--fail-under", "lcc=1"), 2, "lcc is not scored here. Scored: hotpotqa.")
    fails(run(*args, "--fail-under", "english=1"), 2, "the average needs every task")
    no_leftovers(tmp_path, "a", "b", "pred")


def test_harness_bars_follow_the_direction_of_the_metric(run, tmp_path):

    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    metrics = [{"metric": "bits_per_byte"}]
    write_task(tmp_path / "tasks", "rolling", [{"question": STORY}], **rolling, metric_list=metrics)
    missed(harness(run, "--tasks", "rolling", "--fail-under", "rolling=0.01", code=1), "rolling")
    (bar,) = result_of(tmp_path / "out")["bars"]
    assert (bar["rule"], bar["passed"]) == ("at most", False)
    harness(run, "--tasks", "rolling", "--fail-under", "rolling:bits_per_byte=100", "--force")
