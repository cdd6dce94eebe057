"""Complete checkpoints: all files of all processes as they were written, or the one before; a run that is prolonged."""

from __future__ import annotations

import pytest

from longext.errors import ConfigError, DisagreementError, TrainingError
from longext.processes import group as processes
from longext.processes.group import agree
from longext.training.checkpoints import (
    MARKER,
    check_fingerprint,
    complete_checkpoints,
    drop_after,
    find_start,
    last_whole_checkpoint,
    mark_complete,
    read_marker,
)
from longext.training.config import FinetuneConfig
from longext.training.settings import fingerprint, trainer_arguments, warmup_of

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
RANDOM = ("rng_state_0.pth", "rng_state_1.pth")


def print_of(num_steps=6, **settings):
    config = FinetuneConfig(model="m", **{"num_steps": num_steps, "warmup_steps": 100, **settings})
    return config, fingerprint(config, {"warmup_steps": config.warmup_steps}, {}, "weights", "tokens", 2)


def write_checkpoint(directory, step, prints=None, leave_out=(), processes=2):
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in {*FILES, *RANDOM} - set(leave_out):
        (checkpoint / name).write_text(f"{name} of step {step}")
    mark_complete(checkpoint, prints or print_of()[1], processes=processes)
    return checkpoint


@pytest.mark.parametrize("name", [*FILES, *RANDOM])
def test_a_checkpoint_without_a_file_is_never_marked(tmp_path, name):
    with pytest.raises(TrainingError, match="not complete"):
        write_checkpoint(tmp_path, 2, leave_out=[name])
    assert complete_checkpoints(tmp_path) == []


@pytest.mark.parametrize("name", [*FILES, *RANDOM])
@pytest.mark.parametrize("damage", ["missing", "shorter", "altered"])
def test_a_checkpoint_with_a_file_that_is_not_as_written_is_passed_over(tmp_path, name, damage):
    good, bad = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    content = (bad / name).read_bytes()
    (bad / name).write_bytes(content[:-1] if damage == "shorter" else b"X" + content[1:])
    if damage == "missing":
        (bad / name).unlink()
    found, told = last_whole_checkpoint(tmp_path)
    assert found == good
    assert len(told) == 1
    assert f"checkpoint-4: {name}" in told[0]
    config, prints = print_of(resume=True)
    beginning = find_start(config, tmp_path, prints)
    assert beginning.checkpoint == good
    assert name in beginning.notes[0]
    assert "goes on from checkpoint-2" in beginning.notes[0]
    drop_after(tmp_path, good)
    assert complete_checkpoints(tmp_path) == [good]


@pytest.mark.parametrize(
    "marker", ["", "[]", "{}", '{"fingerprint": {}, "files": {}}', '{"fingerprint": 1, "files": 2}']
)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(tmp_path, marker):
    (write_checkpoint(tmp_path, 2) / MARKER).write_text(marker)
    with pytest.raises(ConfigError, match=r"No checkpoint is whole.*checkpoint-2.*another -o"):
        last_whole_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / MARKER).write_text("{}")
    (tmp_path / "checkpoint-4").mkdir()
    assert last_whole_checkpoint(tmp_path) == (None, [])
    drop_after(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]


# --- a run that is prolonged ------------------------------------------------------------------------------------------


def test_a_longer_run_keeps_its_warm_up_and_says_so(tmp_path):
    """6 steps warm up for 3 of the 100 that were asked for; 40 steps would for 20, in the middle of the run."""
    write_checkpoint(tmp_path, 6)
    config, prints = print_of(40, resume=True)
    assert (prints["warmup_used"], warmup_of(config)) == (20, 20)
    beginning = find_start(config, tmp_path, prints)
    assert beginning.fingerprint["warmup_used"] == 3
    assert beginning.notes[0].startswith("The run was begun for 6 steps and goes on from checkpoint-6 to step 40.")
    assert "warm-up stays 3 steps" in beginning.notes[0]
    again = write_checkpoint(tmp_path, 8, beginning.fingerprint)  # and hands it on
    assert read_marker(again)["fingerprint"]["warmup_used"] == 3
    assert find_start(*(lambda c, p: (c, tmp_path, p))(*print_of(80, resume=True))).fingerprint["warmup_used"] == 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"warmup_steps": 50}, "warmup_steps 100, this run has 50"),
        ({"num_steps": 4}, "is beyond --num-steps 4: give at least 6"),
        ({"num_steps": 40, "schedule": "cosine"}, "num_steps None, this run has 40"),
    ],
)
def test_another_schedule_is_refused(tmp_path, changes, text):
    checkpoint = write_checkpoint(tmp_path, 6)
    with pytest.raises(ConfigError, match=text):
        check_fingerprint(checkpoint, print_of(**changes)[1])


def test_a_run_that_is_as_long_as_before_has_nothing_to_tell(tmp_path):
    write_checkpoint(tmp_path, 4)
    config, prints = print_of(resume=True)
    assert find_start(config, tmp_path, prints).notes == ()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("autocast", "given"), [(False, "bf16"), (True, "no"), (False, "fp16"), (False, None)])
def test_an_accelerate_configuration_does_not_decide_the_dtype(tmp_path, monkeypatch, autocast, given):
    """--dtype float32 under a recipe of bf16 trained in bfloat16."""
    import torch
    from accelerate import Accelerator

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", given or "no")
    monkeypatch.setenv("LOCAL_RANK", "0")  # half a launch, which accelerate would take for one
    config = FinetuneConfig(model="m", num_steps=4)
    arguments = trainer_arguments(config, tmp_path, torch.device("cpu"), autocast)
    assert arguments.mixed_precision == ("bf16" if autocast else "no")
    assert Accelerator(cpu=True).mixed_precision == arguments.mixed_precision
    assert arguments.world_size == 1


# --- processes that differ --------------------------------------------------------------------------------------------


def test_the_first_thing_that_processes_do_not_share_is_named_in_each_of_them(monkeypatch):
    facts = {"data": "a", "processes": 2}
    monkeypatch.setattr(processes, "gather", lambda mine: [("head", facts), ("node1", {**facts, "data": "b"})])
    with pytest.raises(DisagreementError, match="data is a in process 0 on head and b in process 1 on node1") as error:
        agree(facts)
    assert error.value.everywhere
    assert error.value.exit_code == 2
    monkeypatch.setattr(processes, "gather", lambda mine: [("head", facts), ("node1", dict(facts))])
    agree(facts)
