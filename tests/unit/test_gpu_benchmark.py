"""benchmarks/gpu.py as a dry run on the CPU: its names, its budget, its files, and what it says of failures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(gpu, tmp_path):
    def run(*parts):
        code = gpu.main(["--device", "cpu", "--tiny", "--part", ",".join(parts), "--out", str(tmp_path)])
        rows = json.loads((tmp_path / "result.json").read_text())["measurements"]
        return code, {row["name"]: row for row in rows}, (tmp_path / "gpu.md").read_text()

    return run


def test_the_default_fits_its_budget_and_names_differ(gpu):
    setting = gpu.Setting(torch.device("cuda"))
    assert sum(one.seconds for one in gpu.choose(list(gpu.DEFAULT), setting)) < 480
    names = [one.name for make in gpu.PARTS.values() for one in make(setting)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "," in name]  # --part splits at commas
    assert all(name.split("/")[0] in gpu.PARTS for name in names)


def test_a_dry_run_of_steps_gradients_and_generation(run):
    code, rows, text = run("table/8192", "parity/gradients/s2/no checkpointing", "eval/generation/1 of 4096")
    assert code == 0
    ours, plain = rows["table/8192/longext"], rows["table/8192/HF + peft + SDPA"]
    assert ours["status"] == plain["status"] == "ok"
    assert ours["tokens_per_second"] > 0 and plain["step_seconds"] > 0
    assert rows["parity/gradients/s2/no checkpointing"]["from_float32"] < 1e-5  # of a dry run, in float32 too
    assert rows["eval/generation/1 of 4096"]["new_tokens_per_second"] > 0
    assert "| 8,192 |" in text and "## eval" in text


def test_kernels_agree_with_the_definition_in_a_dry_run(run):
    _, rows, _ = run("parity/attention/s2 packed", "parity/attention/window")
    measured = [row for row in rows.values() if row["status"] == "ok"]
    assert measured and all(row[key] < 1e-5 for row in measured for key in ("out", "d_query", "d_key", "d_value"))


def test_later_runs_add_to_the_results_and_failures_are_told(gpu, run, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError("too much")

    def broken():
        raise ValueError("no such thing\nand more")

    def part(setting):
        return [gpu.Measurement("kernels/full", 0, out_of_memory), gpu.Measurement("kernels/broken", 0, broken)]

    monkeypatch.setitem(gpu.PARTS, "kernels", part)
    run("eval/generation/1 of 4096")
    code, rows, text = run("kernels")
    assert code == 1
    assert rows["kernels/full"]["status"] == "out of memory"
    assert rows["kernels/broken"]["status"] == "failed: ValueError: no such thing"
    assert rows["eval/generation/1 of 4096"]["status"] == "ok"
    assert "out of memory" in text


def test_a_goal_is_reached_by_one_measurement_that_keeps_all_of_its_bounds(gpu):
    fast = {"name": "variants/32768/fast", "tokens_per_second": 12_000.0, "peak_gib": 30.0}
    lean = {"name": "variants/32768/lean", "tokens_per_second": 8000.0, "peak_gib": 20.0}
    both = {"name": "variants/32768/both", "tokens_per_second": 10_100.0, "peak_gib": 23.9}
    assert "| no | variants/32768/fast" in gpu._goal_lines([fast, lean])[2]
    assert "| yes | variants/32768/both" in gpu._goal_lines([fast, lean, both])[2]
    assert gpu._goal_lines([])[2].endswith("| not run | |")


def test_an_unknown_part_is_refused(gpu):
    with pytest.raises(SystemExit, match="no measurement has that name"):
        gpu.main(["--part", "nonsense", "--device", "cpu"])
