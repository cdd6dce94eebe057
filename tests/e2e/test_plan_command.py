"""`longext plan` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import LLAMA2_7B


@pytest.fixture
def llama(tmp_path):
    """A directory with a config.json alone."""
    directory = tmp_path / "llama2-7b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA2_7B))
    return directory


def test_a_plan_is_shown_and_nothing_is_written(run, llama, tmp_path):
    result = run("plan", llama, "--length", 32768, "--gpus", "8xA100-80GB", "--num-tokens", 2_000_000_000)
    assert result.exit_code == 0, result.output
    for shown in (
        "6,738,415,616",
        "longest that fits",
        "attention share",
        "8 GPUs a row",
        "--sequence-parallel 8",
        "GPU-hours",
    ):
        assert shown in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["llama2-7b"]


def test_a_built_in_size_needs_no_files(run):
    result = run("plan", "llama3-8b", "--length", 1048576, "--gpus", "H200", "--price-per-hour", 3)
    assert result.exit_code == 0, result.output
    for shown in ("does not fit as asked (GPU memory); the first way that does: S2 sweep, 8,192", "built-in size",
                  "a batch costs", "--group-size 8192 --sweep auto", "540.1!", "USD of a batch"):  # fmt: skip
        assert shown in result.stdout
    unknown = run("plan", "llama3-9b", "--length", 4096)
    assert unknown.exit_code == 2
    assert "Did you mean 'llama3-8b'?" in unknown.stderr


def test_json_alone_on_standard_output(run, llama):
    result = run("plan", llama, "--length", 8192, "--method", "lora", "--json")
    record = json.loads(result.stdout)
    assert record["kind"] == "plan"
    assert record["flops"]["forward_dense"]["total"] / 1e12 == pytest.approx(143.5, rel=1e-3)
    assert record["setup"]["attention"] == "full"


def test_an_output_directory_has_table_record_and_picture(run, llama, tmp_path):
    assert run("plan", llama, "--length", 16384, "-o", "out").exit_code == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "result.json", "table.md", "memory.png", "run.json", "recipe.yaml",
    }  # fmt: skip
    assert "length: 16384" in (out / "recipe.yaml").read_text()
    refused = run("plan", llama, "--length", 16384, "-o", "out")
    assert refused.exit_code == 2
    assert "already exists" in refused.stderr


def test_a_probe_calibrates_on_this_machine(run):
    result = run("plan", "books-5m", "--length", 256, "--gpus", "T4-16GB", "--dtype", "float32", "--probe", "--json")
    probe = json.loads(result.stdout)["probe"]
    assert [one["num_layers"] for one in probe["runs"]] == [2, 4]
    assert probe["is_whole"]
    assert 0.85 < probe["memory_ratio"] < 1.15
    assert probe["flops_per_second"] > 0


def test_a_probe_of_a_deep_model_says_what_was_extrapolated(run, tmp_path):
    small = {**LLAMA2_7B, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    directory = tmp_path / "deep"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**small, "intermediate_size": 128, "vocab_size": 256}))
    result = run("plan", directory, "--length", 256, "--method", "full", "--probe")
    assert result.exit_code == 0, result.output
    assert "measured, 4 layers, 256 tokens" in result.stdout
    assert "extrapolated, 32 layers, 256 tokens" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", 0), "`length` must be >= 1, got 0."),
        ((), "Missing: length."),
        (("--length", 4096, "--gpus", "H300-80GB"), "Unknown GPU 'H300-80GB'. Did you mean 'H100-80GB'?"),
        (("--length", 4096, "--method", "qlora"), "Unknown method 'qlora'."),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run, arguments, message):
    result = run("plan", "books-5m", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_directory_without_config_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("plan", "empty", "--length", 4096)
    assert result.exit_code == 2
    assert "No config.json in empty" in result.stderr


def test_a_plan_needs_no_torch(llama):
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from longext.planning.config import PlanConfig\n"
        "from longext.planning.fit import plan_training\n"
        f"plan_training(PlanConfig(model={str(llama)!r}, length=4096))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path.cwd())
