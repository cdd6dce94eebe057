"""`longext gate` as a pull request's job runs it."""

from __future__ import annotations

import json

import pytest
from command_line import fails, ok, result_of

SMALL = ("--lengths", "128,192", "--num-prompts", 20)
TEXT = ("--tests", "none", "--lengths", 64, "--max-tokens", 900, "--num-windows", 6)


def test_a_model_that_passes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    out = ok(run("gate", "books-5m", *SMALL, "--fail-under", 0.5, "--fail-over", "128=500", "-o", "g"))
    assert out.splitlines()[0] == "PASS: 3 of 3 checks passed (95 % sure)."
    record = result_of(tmp_path / "g")
    assert (record["kind"], record["passed"]) == ("gate", True)
    assert [(row["check"], row["length"]) for row in record["checks"]] == [
        ("passkey", 128),
        ("passkey", 192),
        ("perplexity", 128),
    ]
    assert all(row["num_asked"] < row["num_planned"] for row in record["checks"])
    summary = (tmp_path / "step.md").read_text()
    assert summary.startswith("### longext gate: books-5m\n\nPASS: 3 of 3")
    assert "| passkey | 128 | pass |" in summary


def test_a_model_that_fails_exits_with_one_and_keeps_its_results(run, tmp_path):
    args = ("--lengths", 1024, "--num-prompts", 20, "--summary", "sum.md", "-o", "g")
    fails(run("gate", "books-5m", *args), 1, "The gate failed: passkey at 1,024 is 0.0% (at least 80.0%)")
    assert result_of(tmp_path / "g")["passed"] is False
    assert "FAIL: 0 of 1 checks passed: passkey at 1,024 (95 % sure)." in (tmp_path / "sum.md").read_text()


def test_the_perplexity_against_a_model(run, tmp_path):
    ok(run("gate", "books-5m", *TEXT, "--baseline", "books-5m", "--margin", 0.01, "-o", "a"))
    (row,) = result_of(tmp_path / "a")["checks"]
    assert row["limit"] == pytest.approx(1.01 * row["value"])
    assert row["num_asked"] == 3  # the same model: no difference that could vary
    stretched = ("--method", "linear", "--factor", 8)
    fails(run("gate", "books-5m", *stretched, *TEXT, "--baseline", "books-5m"), 1, "baseline at 64 is", "at most")
    record = json.loads(ok(run("gate", "books-5m", *TEXT, "--baseline", "books-5m", "--error-rate", 0, "--json")))
    assert [(row["num_asked"], row["low"]) for row in record["checks"]] == [
        (6, pytest.approx(record["checks"][0]["value"]))
    ]


def test_limits_go_from_all_to_one(run, tmp_path):
    args = ("--fail-under", 0.2, "--fail-under", "192=0.3", "--fail-under", "passkey@128=0.4", "--json")
    record = json.loads(ok(run("gate", "books-5m", *SMALL, *args)))
    assert [row["limit"] for row in record["checks"]] == [0.4, 0.3]


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--tests", "none"), ("Nothing to check",)),
        (("--tests", "pass"), ("Unknown test 'pass'", "passkey")),
        (("--tests", "none", "--fail-under", "0.5"), ("there are none",)),
        (("--fail-under", "80"), ("a share of 0 to 1",)),
        (("--fail-under", "needle=0.5"), ("needle",)),
        (("--fail-over", "777=9"), ("777 is not measured",)),
        (("--baseline", "nowhere"), ("No model at 'nowhere'",)),
        (("--error-rate", "0.9"), ("`error_rate` must be",)),
        (("--lengths", "64", "--fail-over", "64=9", "--data", "no.txt"), ("No data at 'no.txt'",)),
    ],
)
def test_mistakes_end_with_two(run, tmp_path, args, texts):
    fails(run("gate", "books-5m", *args), 2, *texts)
    assert not (tmp_path / "results").exists()
