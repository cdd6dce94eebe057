"""`longext eval short` as a user types it."""

from __future__ import annotations

import json

import pytest
from command_line import fails, no_leftovers, ok, result_of

SMALL = ("--lengths", "64,128", "--max-tokens", 600, "--num-bootstrap", 50)


def test_a_model_against_itself_passes(run, tmp_path):
    out = ok(run("eval", "short", "books-5m", "--against", "books-5m", *SMALL, "-o", "s"))
    for text in ("The base is books-5m", "+0.00%", "pass", "Passed"):
        assert text in out
    record = result_of(tmp_path / "s")
    assert (record["kind"], record["passed"]) == ("short-context", True)
    assert [row["length"] for row in record["results"]] == [64, 128]
    assert record["base"]["id"] == "books-5m"


def test_a_stretched_model_fails_with_one_and_its_result_is_kept(run, tmp_path):
    args = ("--method", "linear", "--factor", 8, *SMALL, "-o", "s")
    fails(run("eval", "short", "books-5m", *args), 1, "FAILED", "above the tolerance of 2.00%")
    assert result_of(tmp_path / "s")["passed"] is False
    ok(run("eval", "short", "books-5m", *args, "--force", "--tolerance", 100))


def test_an_extended_directory_and_the_trained_length_by_default(run, tmp_path):
    ok(run("extend", "books-5m", "--method", "dynamic", "--factor", 2, "-o", "e"))
    args = ("--against", "books-5m", "--num-windows", 1)
    record = json.loads(ok(run("eval", "short", "e", *args, "--json", "-o", "s")))
    assert [(row["length"], row["change"]) for row in record["results"]] == [(256, 0.0), (512, 0.0)]


def test_a_memory_against_its_own_model(run):
    args = ("--memory", "window:192", "--segment", 64, "--tolerance", 1, *SMALL, "--json")
    record = json.loads(ok(run("eval", "short", "books-5m", *args)))
    assert record["model"]["memory"]["spec"] == "window:192"
    assert "memory" not in record["base"]
    assert all(abs(row["change"]) < 1e-4 for row in record["results"])  # the window holds all of so short a text


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        ((), ("--against BASE",)),
        (("--against", "nowhere"), ("No model at 'nowhere'",)),
        (("--against", "books-5m", "--lengths", "1024"), ("trained length 512", "1024")),
        (("--against", "books-5m", "--lengths", "2"), ("--lengths",)),
        (("--against", "books-5m", "--tolerance", "-1"), ("`tolerance` must be >= 0",)),
        (("--against", "books-5m", "--tolerance", "nan"), ("`tolerance` must be a finite number",)),
        (("--against", "books-5m", "--num-windows", "0"), ("`num_windows` must be >= 1",)),
        (("--against", "books-5m", "--data", "no.txt"), ("No data at 'no.txt'",)),
        (("--against", "books-5m", "--max-tokens", "100"), ("the longest has 100",)),
        (("--memory", "windo"), ("--memory 'windo'",)),
    ],
)
def test_wrong_flags_end_in_one_line(run, tmp_path, args, texts):
    fails(run("eval", "short", "books-5m", "-o", "s", *args), 2, *texts)
    no_leftovers(tmp_path)


def test_a_missing_model_is_told_before_the_base_runs(run, tmp_path):
    fails(run("eval", "short", "nowhere", "--against", "books-5m", "-o", "s"), 2, "No model at 'nowhere'")
    no_leftovers(tmp_path)


def test_another_tokenizer_is_refused(run, monkeypatch, tmp_path):
    from longext.models.hf import HFLanguageModel

    ok(run("extend", "books-5m", "--method", "linear", "--factor", 2, "-o", "e"))
    real = HFLanguageModel.encode
    monkeypatch.setattr(HFLanguageModel, "encode", lambda self, *a, **k: real(self, *a, **k)[self.name == "e" :])
    fails(run("eval", "short", "e", "--against", "books-5m", *SMALL, "-o", "s"), 2, "different tokens")
