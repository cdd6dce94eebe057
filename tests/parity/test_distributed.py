"""Several processes against one: data parallel, sequence parallel and FSDP2, on two CPU processes with gloo."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from longext.training.callbacks import read_metrics
from longext.training.checkpoints import complete_checkpoints

RUN = (
    "finetune", "books-5m", "--data", "uneven.jsonl", "--task", "sft", "--target-length", 512, "--num-steps", 3,
    "--learning-rate", 1e-3, "--set", "warmup_steps=1", "--seed", 1,
)  # fmt: skip
PARALLEL = {
    "data": ("--accumulation", 1, "--num-processes", 2),
    "sequence": ("--accumulation", 2, "--num-processes", 2, "--sequence-parallel", 2),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run in one process: (losses, adapter)."""
    return train(tmp_path_factory.mktemp("one"), "--accumulation", 2)


def write_uneven_examples(directory):
    """One example a row, with 8 to 288 answer words: a mean of means would differ from the mean over tokens."""
    rows = [{"instruction": "tell " * (320 - 40 * n), "output": "so " * (8 + 40 * n)} for n in range(8)]
    (directory / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(directory, *args):
    from safetensors.torch import load_file

    command = [sys.executable, "-m", "longext", *map(str, (*RUN, *args, "-o", "out"))]
    write_uneven_examples(directory)
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(directory / "out" / "metrics.jsonl")
    assert done.stdout.count("Wrote out") == 1  # one process speaks
    return [line["loss"] for line in lines], load_file(directory / "out" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", PARALLEL)
def test_two_processes_equal_one_with_the_same_global_batch(kind, tmp_path, one_process):
    losses, adapter = train(tmp_path, *PARALLEL[kind])
    assert losses == pytest.approx(one_process[0], abs=1e-5)
    for name, expected in one_process[1].items():
        # Adam turns rounding into steps of the size of the learning rate
        torch.testing.assert_close(adapter[name], expected, rtol=0, atol=2e-4)


def test_sequence_parallel_attention_equals_one_process():
    """Outputs and gradients in float64, every variant, GQA and MQA: two ranks, 1e-10."""
    run_two("sequence")


def test_fsdp2_numerics():
    """torch's fully_shard over two ranks: the loss and gradients of S2-Attn training with the chunked loss, 1e-5."""
    run_two("fsdp")


def test_segment_parallel_equals_one_process():
    """Memories gathered, their gradients scattered: every independent architecture in float64, 1e-10."""
    run_two("segments")


COMPRESS = (
    "compress-train", "books-5m", "--data", "sample", "--segment", 64, "--ratio", 8, "--document-length", 300,
    "--lora-r", 4, "--lora-alpha", 8, "--num-steps", 3, "--learning-rate", 1e-3, "--set", "warmup_steps=1",
    "--objectives", "lm,ae:0.5", "--seed", 1, "-o", "out",
)  # fmt: skip


def test_compressor_in_two_processes_equals_one(tmp_path):
    """Two documents a step: accumulated, dealt to two processes, and each shared by two processes."""
    from safetensors.torch import load_file

    ways = {
        "one": ("--accumulation", 2),
        "data": ("--accumulation", 1, "--num-processes", 2),
        "segments": ("--accumulation", 2, "--num-processes", 2, "--sequence-parallel", 2),
    }
    losses, weights = {}, {}
    for name, args in ways.items():
        directory = tmp_path / name
        directory.mkdir()
        command = [sys.executable, "-m", "longext", *map(str, (*COMPRESS, *args))]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Wrote out") == 1
        lines = read_metrics(directory / "out" / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines]
        assert [line["documents"] + line["ae"] for line in lines] == pytest.approx(losses[name], abs=1e-5)
        weights[name] = load_file(directory / "out" / "compressor.safetensors")
    for name in ("data", "segments"):
        assert losses[name] == pytest.approx(losses["one"], abs=1e-5)
        for key, expected in weights["one"].items():
            # Adam turns rounding into steps of the size of the learning rate
            torch.testing.assert_close(weights[name][key], expected, rtol=0, atol=2e-4)


def run_two(what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(__file__).replace("test_distributed.py", "two_processes.py")
    done = subprocess.run([*command, script, what], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2, done.stdout


def test_sigterm_to_the_launcher_stops_all_processes_after_a_checkpoint(tmp_path):
    write_uneven_examples(tmp_path)
    args = [*map(str, RUN), "--num-steps", "500", "--save-every", "1", "--num-processes", "2", "-o", "out"]
    command = [sys.executable, "-m", "longext", *args]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "out.running" / "checkpoints"
    end = time.monotonic() + 200
    while time.monotonic() < end and not complete_checkpoints(checkpoints):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors
    assert errors.count("stopped by SIGTERM after step") == 1, errors
    assert "Traceback" not in errors
    last = complete_checkpoints(checkpoints)[-1]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {file.name for file in last.iterdir()}
