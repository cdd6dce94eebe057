"""`longext eval diff` as a user types it."""

from __future__ import annotations

import json

import pytest
from command_line import fails, ok

PASSKEY = ("--lengths", 128, "--depths", "0,1", "--num-trials", 1)


def test_two_passkey_results_beside_each_other(run):
    ok(run("passkey", "books-5m", *PASSKEY, "-o", "a"))
    ok(run("passkey", "books-5m", *PASSKEY, "--method", "linear", "--factor", 8, "--seed", 1, "-o", "b"))
    out = ok(run("eval", "diff", "a", "b/result.json"))
    for text in ("by_length[length=128].accuracy", "B - A", "model.rope_parameters.rope_type", "linear", "Comparable"):
        assert text in out
    assert "settings differ: protocol.seed" in out
    found = json.loads(ok(run("eval", "diff", "a", "b", "--json")))
    assert (found["kind"], found["of"], found["comparable"]) == ("diff", "passkey", True)
    assert "by_length[length=128].accuracy" in [pair["score"] for pair in found["scores"]]


def test_what_is_no_result_ends_in_one_line(run, tmp_path):
    ok(run("passkey", "books-5m", *PASSKEY, "-o", "a"))
    fails(run("eval", "diff", "a", "nowhere"), 2, "No result at 'nowhere'")
    (tmp_path / "empty").mkdir()
    fails(run("eval", "diff", "a", "empty"), 2, "holds no result.json")
    fails(run("eval", "diff", "a", "a/table.md"), 2, "table.md is not valid JSON")
    fails(run("eval", "diff", "a/run.json", "a"), 2, "no result of longext")
    fails(run("eval", "diff", "a"), 2, "Missing: b")


@pytest.mark.parametrize("change", [{"kind": "perplexity"}, {"schema": "other/1"}])
def test_results_that_do_not_go_together(run, tmp_path, change):
    ok(run("passkey", "books-5m", *PASSKEY, "-o", "a"))
    record = json.loads((tmp_path / "a/result.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps({**record, **change}))
    fails(run("eval", "diff", "a", "b.json"), 2, "kind 'perplexity'" if "kind" in change else "no result of longext")
