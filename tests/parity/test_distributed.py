"""Several processes against one, on two CPU processes with gloo: data, sequence and segment parallel, FSDP2, resume.

One launch under torchrun runs every command and every comparison of tensors: processes take seconds to start.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from command_line import undrawn
from safetensors.torch import load_file
from typer.testing import CliRunner

from longext.training.callbacks import read_metrics
from longext.training.checkpoints import complete_checkpoints, read_marker

RUN = (
    "finetune", "books-5m", "--data", "../uneven.jsonl", "--task", "sft", "--target-length", 128, "--num-steps", 3,
    "--learning-rate", 1e-3, "--set", "warmup_steps=1", "--seed", 1, "-o", "out",
)  # fmt: skip
COMPRESS = (
    "compress-train", "books-5m", "--data", "sample", "--segment", 32, "--ratio", 8, "--document-length", 150,
    "--lora-r", 4, "--lora-alpha", 8, "--num-steps", 3, "--learning-rate", 1e-3, "--set", "warmup_steps=1",
    "--objectives", "lm,ae:0.5", "--seed", 1, "-o", "out",
)  # fmt: skip
MIXED = (
    *RUN, "--data", "sample", "--task", "pretrain", "--method", "yarn", "--original-length", 64, "--target-length", 128,
    "--mixed-window", "--short-share", 0.5,
)  # fmt: skip
# evaluations, whose samples are dealt: a suite that generates, one by likelihood, perplexity, all in one
EVALS = {
    "eval-needle": ("eval", "needle", "books-5m", "--tasks", "single", "--lengths", "200,256",
        "--num-trials", 1, "--haystack", "noise", "--max-new-tokens", 8),
    "eval-ranked": ("eval", "longeval", "books-5m", "--sizes", "2,3", "--num-cases", 3, "--complete",
        "--answers", "likelihood"),
    # prompts that begin alike, whose beginning is read once: more than a stretch of them
    "eval-shared": ("eval", "passkey", "books-5m", "--lengths", 96, "--depths", 1, "--num-trials", 18,
        "--answers", "both"),
    "eval-ppl": ("eval", "ppl", "books-5m", "--lengths", "64,96", "--max-tokens", 500, "--batch-tokens", 200),
    "eval-compare": ("compare", "books-5m", "--methods", "none,yarn", "--factor", 2, "--lengths", "96",
        "--max-tokens", 250, "--num-trials", 1, "--depths", "0,1"),
    "eval-memory": ("eval", "ppl", "books-5m", "--memory", "window:64", "--segment", 32, "--lengths", "0,32",
        "--num-places", 2),
}  # fmt: skip
ONE = {
    "finetune": (*RUN, "--accumulation", 2),
    "mixed": (*MIXED, "--accumulation", 2),
    "compress": (*COMPRESS, "--accumulation", 2),
    **{f"one-{name}": (*args, "-o", "out") for name, args in EVALS.items()},
}
SAVING = ("--accumulation", 1, "--save-every", 2, "--set", "lora_dropout=0.1")
SHORT = (*RUN, "--num-steps", 1, "--accumulation", 1, "--save-every", 1)
# what both processes run, one after the other
TWO = {
    "finetune-data": {"args": (*RUN, "--accumulation", 1)},
    "finetune-sequence": {"args": (*RUN, "--accumulation", 2, "--sequence-parallel", 2)},
    "finetune-swept": {"args": (*RUN, "--accumulation", 1, "--sweep", 50)},
    "finetune-tiled": {"args": (*RUN, "--accumulation", 1, "--tile", 25, "--nested", 3)},
    "mixed-data": {"args": (*MIXED, "--accumulation", 1)},  # one process has short rows alone, the other long ones
    "compress-data": {"args": (*COMPRESS, "--accumulation", 1)},
    "compress-segments": {"args": (*COMPRESS, "--accumulation", 2, "--sequence-parallel", 2)},
    "whole": {"args": (*RUN, *SAVING)},
    "resumed": {
        "args": (*RUN, *SAVING, "--resume"),
        "copy": [("whole/out", "resumed/out.running")],
        "spoil": "resumed/out.running/checkpoints/checkpoint-3/optimizer.pt",
    },
    "apart": {"args": SHORT, "in": ("here", "there")},  # as two machines without a shared disk
    "apart-resumed": {
        "args": (*SHORT, "--resume"),
        "in": ("here2", "there"),
        "copy": [("here/out", "here2/out.running")],
    },
    **{name: {"args": (*args, "-o", "out")} for name, args in EVALS.items()},
    "eval-late": {"args": (*EVALS["eval-ppl"], "--fail-over", "96=1", "-o", "out")},
    "wrong": {"args": (*SHORT, "--method", "linear", "--target-length", 1024), "rope": "scaled twice"},
}
CHECKS = ("sequence", "fsdp", "segments")


def write_uneven_examples(directory):
    """One example a row, with 2 to 72 answer words: a mean of means would differ from the mean over tokens."""
    rows = [{"instruction": "tell " * (80 - 10 * n), "output": "so " * (2 + 10 * n)} for n in range(8)]
    (directory / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which everything ran: in this process, and in two of one launch."""
    from longext.cli import app

    place = tmp_path_factory.mktemp("runs")
    write_uneven_examples(place)
    with pytest.MonkeyPatch.context() as patch, undrawn():
        for name, args in ONE.items():
            (place / name).mkdir()
            patch.chdir(place / name)
            done = CliRunner().invoke(app, [str(arg) for arg in args])
            assert done.exit_code == 0, done.output
    commands = {name: {**command, "args": [str(arg) for arg in command["args"]]} for name, command in TWO.items()}
    (place / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run([*command, script, place, *CHECKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "stdout").write_text(done.stdout)
    return place


def outcomes(place, name):
    """What a command of `TWO` ended with in each process."""
    return [json.loads((place / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def losses(place, name):
    return [line["loss"] for line in read_metrics(place / name / "out" / "metrics.jsonl")]


@pytest.mark.parametrize("kind", CHECKS)
def test_two_ranks_compute_what_one_does(place, kind):
    """Attention by sequence (float64, every variant, GQA and MQA: 1e-10), fully_shard (1e-5), segments (1e-10)."""
    assert (place / "stdout").read_text().count(f"{kind} equal") == 2


@pytest.mark.parametrize("name", [name for name in TWO if name.startswith(("finetune", "mixed", "compress"))])
def test_two_processes_equal_one_with_the_same_global_batch(place, name):
    """Rows (or documents): accumulated, dealt to two processes, swept in chunks there, each shared by two processes."""
    main, other = outcomes(place, name)
    assert (main["code"], other["code"]) == (0, 0), main
    assert (main["stdout"].count("Wrote out"), other["stdout"]) == (1, "")  # one process speaks
    one = name.partition("-")[0]
    assert losses(place, name) == pytest.approx(losses(place, one), abs=1e-5)
    file = "compressor.safetensors" if one == "compress" else "adapter_model.safetensors"
    found = load_file(place / name / "out" / file)
    for key, expected in load_file(place / one / "out" / file).items():
        # Adam turns rounding into steps of the size of the learning rate
        torch.testing.assert_close(found[key], expected, rtol=0, atol=2e-4)
    if one == "compress":
        lines = read_metrics(place / name / "out" / "metrics.jsonl")
        assert [line["documents"] + line["ae"] for line in lines] == pytest.approx(losses(place, name), abs=1e-5)


def test_a_damaged_checkpoint_is_passed_over_and_two_processes_go_on_bit_for_bit(place):
    """Dropout is on: each process needs its own random state."""
    main, other = outcomes(place, "resumed")
    assert (main["code"], other["code"]) == (0, 0), main
    assert "checkpoint-3: optimizer.pt is not what was written" in main["stderr"].replace("\n", " ")
    assert "goes on from checkpoint-2" in main["stderr"].replace("\n", " ")
    assert losses(place, "resumed") == losses(place, "whole")
    whole, resumed = (load_file(place / name / "out/adapter_model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_wrong_rope_ends_both_processes_and_one_says_so(place):
    main, other = outcomes(place, "wrong")
    assert (main["code"], other["code"]) == (1, 1), main
    assert "does not rotate as `linear` says" in main["stderr"].replace("\n", " ")
    assert other["stderr"] == ""
    assert not list((place / "wrong").iterdir())


@pytest.mark.parametrize("name", EVALS)
def test_an_evaluation_dealt_to_two_processes_has_the_record_of_one(place, name):
    main, other = outcomes(place, name)
    assert (main["code"], other["code"]) == (0, 0), (main, other)
    assert (main["stdout"].count("Results: out"), other["stdout"], other["stderr"]) == (1, "", "")
    found, expected = ({file.name for file in (place / each / "out").rglob("*")} for each in (name, f"one-{name}"))
    assert found == expected
    assert untimed_record(place / name / "out") == untimed_record(place / f"one-{name}" / "out")
    assert [path.name for path in (place / name).iterdir()] == ["out"]  # nothing kept is left
    if name == "eval-shared":
        assert json.loads((place / name / "out" / "result.json").read_text())["cost"]["num_shared_tokens"] > 0


def untimed_record(directory):
    """The records in a directory and files of answers, without what another run has of its own."""

    def untimed(value):
        if isinstance(value, dict):
            return {key: untimed(own) for key, own in value.items() if key not in ("seconds", "command", "cost")}
        return list(map(untimed, value)) if isinstance(value, list) else value

    records = [untimed(json.loads(file.read_text())) for file in sorted(directory.rglob("result.json"))]
    return records, [file.read_bytes() for file in sorted(directory.rglob("answers.jsonl"))]


def test_a_missed_limit_ends_the_main_process_alone_with_1(place):
    main, other = outcomes(place, "eval-late")
    assert (main["code"], other["code"]) == (1, 0)
    assert main["stderr"].count("96") == 1


def test_without_a_shared_disk_a_resume_stops_in_one_line(place):
    """The main process has the checkpoint, with the random states of both; the other machine has none of it."""
    main, other = outcomes(place, "apart")
    assert (main["code"], other["code"]) == (0, 0), main
    kept = complete_checkpoints(place / "here/out/checkpoints")[-1]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(read_marker(kept)["files"])
    main, other = outcomes(place, "apart-resumed")
    assert (main["code"], other["code"]) == (2, 2)
    assert main["stderr"].count("\n") == 1
    assert "the checkpoint to resume is checkpoint-1 in process 0" in main["stderr"]
    assert "none in process 1" in main["stderr"]
    assert other["stderr"] == ""


def test_sigterm_to_the_launcher_stops_all_processes_after_a_checkpoint(tmp_path):
    write_uneven_examples(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    args = [*map(str, SHORT), "--num-steps", "500", "--num-processes", "2"]
    command = [sys.executable, "-m", "longext", *args]
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoints = work / "out.running" / "checkpoints"
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


def test_an_evaluation_goes_on_in_one_process_after_kill_9_of_one_of_two(tmp_path, monkeypatch):
    """The launcher says so in one line; a line that was being written is dropped, what is known is not scored again."""
    from longext.cli import app
    from longext.models.answer_file import Journal

    args = ["eval", "ppl", "books-5m", "--lengths", "512", "--stride", "128", "--max-tokens", "5000", "-o", "out"]
    command = [sys.executable, "-m", "longext", *args, "--num-processes", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    other, end = tmp_path / "out.scores.process1.jsonl", time.monotonic() + 200
    while time.monotonic() < end and not (other.is_file() and other.read_bytes().count(b"\n") > 1):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    (victim,) = (each for each in psutil.Process(process.pid).children() if each.environ().get("RANK") == "1")
    victim.kill()
    printed, errors = process.communicate(timeout=100)
    assert (process.returncode, printed) == (1, ""), errors
    assert "process 1 of 2 was ended by SIGKILL" in errors
    assert errors.count("The same command goes on from the answers so far") == 1
    with other.open("a") as file:
        file.write('{"id": "cut o')
    known = sum(file.read_bytes().count(b"\n") - 1 for file in tmp_path.glob("out.scores*"))
    scored, add = [], Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, rows: (scored.extend(rows), add(self, rows)))
    monkeypatch.chdir(tmp_path)
    for output in ("out", "whole"):
        done = CliRunner().invoke(app, [*args[:-1], output])
        assert done.exit_code == 0, done.output
        if output == "out":
            assert 0 < known == 36 - len(scored)
    assert untimed_record(tmp_path / "out") == untimed_record(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
