"""`longext eval effective` as a user types it."""

from __future__ import annotations

import json

import pytest
from command_line import fails, no_leftovers, ok, result_of

SMALL = ("--num-trials", 1, "--depths", "0,1")


def test_table_picture_and_record(run, tmp_path):
    out = ok(run("eval", "effective", "books-5m", *SMALL, "--max-length", 192, "-o", "e"))
    for text in ("(effective/passkey)", "at least 80%", "interval above", "128", "192"):
        assert text in out
    record = result_of(tmp_path / "e")
    assert (record["kind"], record["protocol"]["id"]) == ("effective-length", "effective/passkey")
    assert [(row["length"], row["num_trials"]) for row in record["results"]] == [(128, 2), (192, 2)]
    assert record["results"][0]["order"] == 1
    assert (tmp_path / "e/effective.png").stat().st_size > 5000


def test_every_length_equals_the_passkey_command(run):
    args = ("books-5m", *SMALL, "--method", "linear", "--factor", 2, "--seed", 3, "--json")
    record = json.loads(ok(run("eval", "effective", *args, "--min-length", 192, "--max-length", 256)))
    lengths = ",".join(str(row["length"]) for row in record["results"])
    direct = json.loads(ok(run("passkey", *args, "--lengths", lengths)))
    keys = ("length", "num_correct", "num_trials", "accuracy", "low", "high")
    assert [[row[key] for key in keys] for row in record["results"]] == [
        [row[key] for key in keys] for row in direct["by_length"]
    ]


def test_the_needle_test_equals_the_needle_command(run):
    args = ("books-5m", *SMALL, "--json")
    record = json.loads(
        ok(run("eval", "effective", *args, "--test", "needle", "--min-length", 256, "--max-length", 256))
    )
    direct = json.loads(ok(run("eval", "needle", *args, "--tasks", "single", "--scoring", "exact", "--lengths", 256)))
    assert [row["accuracy"] for row in record["results"]] == [row["score"] for row in direct["by_length"]]
    assert record["protocol"]["id"] == "effective/needle"


def test_through_a_memory(run):
    args = ("--memory", "window:64", "--segment", 64, "--max-length", 128, "--json")
    record = json.loads(ok(run("eval", "effective", "books-5m", *SMALL, *args)))
    assert record["model"]["memory"]["spec"] == "window:64"


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        ((), ("Missing: max_length",)),
        (("--max-length", 1000), ("--max-length must be a multiple of 64", "1024")),
        (("--max-length", 64), ("--min-length 128 is above",)),
        (("--max-length", 256, "--bar", 80), ("--bar", "80")),
        (("--max-length", 256, "--test", "needles"), ("Did you mean 'needle'",)),
        (("--max-length", 256, "--depths", "2"), ("`depths` must be <= 1",)),
        (("--max-length", 256, "--min-length", 64), ("needs at least",)),
        (("--max-length", 256, "--min-length", 64, "--test", "needle"), ("needs at least",)),
    ],
)
def test_wrong_flags_end_in_one_line(run, tmp_path, args, texts):
    fails(run("eval", "effective", "books-5m", "-o", "e", *args), 2, *texts)
    no_leftovers(tmp_path)
