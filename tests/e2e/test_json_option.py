"""`--json` and `--json -`: standard output holds the record and nothing else, for every command that has it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from advice import commands
from harness_tasks import write_choices

from longext.cli.app import without_dash
from longext.compressor.base import build_compressor
from longext.compressor.checkpoint import find_base, load_backbone, save_compressor
from longext.compressor.spec import CompressorSpec

BOOKS = "books-5m"
PPL = ("--lengths", "64", "--max-tokens", 200, "--num-bootstrap", 5)
NEEDLE = ("--lengths", 256, "--num-trials", 1)
PASSKEY = ("--lengths", 128, "--num-trials", 1, "--depths", 0)
COMMANDS = {
    "extend": (BOOKS, "--method", "yarn", "--factor", 2, "--no-check"),
    "inspect": (BOOKS,),
    "plan": (BOOKS, "--length", 512),
    "serve-config": (BOOKS, "--engine", "vllm"),
    "generate": (BOOKS, "--prompt", "The old man", "--max-new-tokens", 2),
    "memory": ("build", "story.txt", "--model", BOOKS, "--memory", "thinned:64", "-o", "a.memory"),
    "passkey": (BOOKS, *PASSKEY),
    "compare": (BOOKS, *PPL, "--stride", 32, "--methods", "none,linear", "--factor", 2, "--no-passkey"),
    "advise": (BOOKS, "--target-length", 1024, "--methods", "yarn,window", "--num-places", 1),
    "gate": (BOOKS, "--lengths", 128, "--num-prompts", 5, "--fail-under", 0),
    "finetune": (BOOKS, "--data", "sample", "--method", "linear", "--target-length", 1024, "--dry-run"),
    "compress-train": (BOOKS, "--data", "sample", "--segment", 64, "--dry-run"),
    "eval ppl": (BOOKS, *PPL, "--stride", 32),
    "eval longppl": (BOOKS, "--evaluator", BOOKS, "--lengths", 256, "--min-gain", 0.5, "--max-loss", 6),
    "eval short": (BOOKS, *PPL, "--against", BOOKS),
    "eval effective": (BOOKS, "--num-trials", 1, "--depths", 0, "--max-length", 128),
    "eval needle": (BOOKS, *NEEDLE, "--tasks", "single", "--max-new-tokens", 8),
    "eval longeval": (BOOKS, "--sizes", 3, "--num-cases", 1, "--complete"),
    "eval babilong": (BOOKS, "--data", "facts", "--tasks", "qa1", "--max-new-tokens", 2),
    "eval longbench": (BOOKS, "--data", "bench", "--tasks", "hotpotqa", "--max-length", 60),
    "eval ruler": (BOOKS, "--lengths", 400, "--num-trials", 1, "--tasks", "niah_single_1", "--answers", "likelihood"),
    "eval nolit": (
        BOOKS,
        "--lengths",
        300,
        "--num-trials",
        1,
        "--tasks",
        "one_hop",
        "--depths",
        0,
        "--max-new-tokens",
        2,
    ),
    "eval mrcr": (BOOKS, "--lengths", 1024, "--num-trials", 1, "--needles", 2, "--answers", "likelihood"),
    "eval graphwalks": (BOOKS, "--lengths", 512, "--num-trials", 1, "--tasks", "parents", "--max-new-tokens", 16),
    "eval longbench2": (BOOKS, "--data", "rows.json", "--max-length", 200, "--answers", "likelihood"),
    "eval infinitebench": (BOOKS, "--data", "infinite", "--max-length", 90),
    "eval harness": (BOOKS, "--tasks", "choices", "--include-path", "tasks"),
    "eval reconstruction": ("uio", "--num-samples", 1, "--num-bootstrap", 2, "--max-tokens", 100),
    "eval efficiency": (BOOKS, "--lengths", 64, "--num-new-tokens", 2, "--num-repeats", 1),
    "eval diff": ("a.json", "a.json"),
    "doctor": (),
}
SAME = {"diff", "eval passkey"}  # `eval diff` and `passkey` under their other names
# need an adapter, results, a second process, a minute: tests of their own
ELSEWHERE = {"push", "search", "merge", "convert", "export", "report", "verify", *SAME}


def with_json():
    """The names of all commands that have --json."""
    return {name for name, own in commands().items() if any("--json" in option.opts for option in own.params)}


def test_every_command_with_the_option_is_here():
    assert with_json() - ELSEWHERE == set(COMMANDS)


@pytest.fixture
def prepared(run, tmp_path, request):
    """What a command reads, in an empty directory."""
    name = request.node.callspec.params["name"]
    if name == "eval babilong":
        (tmp_path / "facts/0k").mkdir(parents=True)
        row = {"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}
        (tmp_path / "facts/0k/qa1.jsonl").write_text(json.dumps(row))
    elif name == "eval longbench2":
        row = {
            "_id": "1",
            "domain": "x",
            "sub_domain": "y",
            "difficulty": "easy",
            "length": "short",
            "question": "Who?",
        }
        choices = {f"choice_{letter}": f"person {letter}" for letter in "ABCD"}
        (tmp_path / "rows.json").write_text(
            json.dumps([{**row, **choices, "answer": "B", "context": "person B. " * 99}])
        )
    elif name == "eval infinitebench":
        (tmp_path / "infinite").mkdir()
        row = {"context": "The pass key is 71432.", "input": "What is the pass key?", "answer": ["71432"]}
        (tmp_path / "infinite/passkey.jsonl").write_text(json.dumps(row))
    elif name == "eval longbench":
        (tmp_path / "bench").mkdir()
        row = {"input": "Who?", "context": "A girl \u2026 \U0001f6a3 kept it.", "answers": ["a girl"]}
        (tmp_path / "bench/hotpotqa.jsonl").write_text(json.dumps(row))
    elif name == "memory":
        (tmp_path / "story.txt").write_text("The keeper climbed the stairs. " * 9)
    elif name == "eval harness":
        write_choices(tmp_path / "tasks")
    elif name == "eval reconstruction":
        base = find_base(BOOKS)
        torch.manual_seed(0)
        spec = CompressorSpec(segment=32, ratios=(8,), rank=4, alpha=8.0)
        (tmp_path / "uio").mkdir()
        save_compressor(tmp_path / "uio", build_compressor(load_backbone(base, device="cpu")[0], spec), base)
    elif name == "eval diff":
        record = {"schema": "longext.result/1", "kind": "x", "model": {}, "protocol": {}, "data": {}, "results": []}
        (tmp_path / "a.json").write_text(json.dumps(record))
    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_standard_output_is_the_record_alone(prepared, tmp_path, name):
    result = prepared(*name.split(), "--json", "-", *COMMANDS[name])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert isinstance(record, dict) and len(record) > 3
    written = [path for path in tmp_path.rglob("result.json")]
    if written:  # what was printed is what was written, and where is told aside
        assert json.loads(written[0].read_text()) == record
        assert "Results: " in result.stderr


def test_a_verification_leaves_the_json_of_extend_whole(run):
    result = run("extend", BOOKS, "--method", "linear", "--factor", 2, "-o", "out", "--verify", "--json")
    assert json.loads(result.stdout)["kind"] == "extend"
    assert "out is what it says" in result.stderr


def test_both_spellings_are_the_flag():
    assert without_dash(["eval", "ppl", "m", "--json", "-"]) == ["eval", "ppl", "m", "--json"]
    assert without_dash(["diff", "--json", "-", "a", "b"]) == ["diff", "--json", "a", "b"]
    assert without_dash(["x", "--json=-", "y"]) == ["x", "--json", "y"]
    assert without_dash(["--json", "m", "-", "--json"]) == ["--json", "m", "-", "--json"]


def test_a_file_behind_json_is_refused_not_ignored(run):
    result = run("eval", "ppl", BOOKS, "--json", "out.json")
    assert result.exit_code == 2
    assert "out.json" in result.stderr


def test_a_process_prints_nothing_else(tmp_path):
    command = [sys.executable, "-m", "longext", "passkey", BOOKS, *map(str, PASSKEY), "--json", "-"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "passkey"


def test_a_missed_bar_leaves_the_json_whole(run):
    result = run("passkey", BOOKS, *PASSKEY, "--filler", "book", "--num-digits", 12, "--fail-under", 1, "--json")
    record = json.loads(result.stdout)
    assert (result.exit_code == 0) == record["bars"][0]["passed"]
