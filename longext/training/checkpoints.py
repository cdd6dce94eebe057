"""Checkpoints of a run: complete or not there, the last k kept, and only for the run that made them.

A checkpoint counts once `complete.json` is in it, written last. It lists every file with its size and SHA-256, and
holds the fingerprint of the run: everything that decides which numbers come next. Resuming with another fingerprint is
refused; a checkpoint whose files are not what was written is passed over for the one before it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.checksums import find_damage, sum_files
from longext.errors import ConfigError, TrainingError
from longext.processes.group import agree
from longext.training.config import TrainingConfig
from longext.untrusted import read_json

CHECKPOINTS = "checkpoints"  # the folder of a run's directory
MARKER = "complete.json"
_PREFIX = "checkpoint-"
# What a run decides once and takes along when it is prolonged: not compared, taken over.
KEPT = ("warmup_used", "last_step")
_NOT_COMPARED = (*KEPT, "threads")


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest step first."""
    complete = [path for path in directory.glob(f"{_PREFIX}*") if (path / MARKER).is_file() and _step(path) >= 0]
    return sorted(complete, key=_step)


def _step(checkpoint: Path) -> int:
    text = checkpoint.name.removeprefix(_PREFIX)
    return int(text) if text.isdecimal() else -1


def random_state_name(rank: int, processes: int) -> str:
    """Return the file in which Trainer keeps the state of a process's random generators."""
    return f"rng_state_{rank}.pth" if processes > 1 else "rng_state.pth"


def mark_complete(checkpoint: Path, fingerprint: dict[str, Any], *, processes: int = 1, sharded: bool = False) -> None:
    """Write the marker: the checkpoint's files are on the disk before it is.

    Args:
        processes: whose random states must be there.
        sharded: accelerate divides weights and optimiser, under names of its own.

    Raises:
        TrainingError: a file that a resume needs was not written.
    """
    needed = ["trainer_state.json", *(random_state_name(rank, processes) for rank in range(processes))]
    needed += [] if sharded else ["optimizer.pt", "scheduler.pt"]
    partial = checkpoint / f"{MARKER}.partial"
    partial.unlink(missing_ok=True)
    sums = sum_files(checkpoint, leave_out=MARKER)
    missing = [name for name in needed if name not in sums]
    if missing or not (sharded or any(name.endswith(".safetensors") for name in sums)):
        raise TrainingError(
            f"{checkpoint} is not complete: {', '.join(missing) or 'the weights'} was not written. Is the disk full?"
        )
    for path in [*checkpoint.rglob("*"), checkpoint]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    content = {"fingerprint": fingerprint, "files": sums}
    partial.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")
    partial.replace(checkpoint / MARKER)


def last_whole_checkpoint(directory: Path, *, contents: bool = True) -> tuple[Path | None, list[str]]:
    """Return the last checkpoint whose files are as they were written, and what is wrong with later ones.

    Args:
        contents: hash the files; without it presence and sizes are looked at alone.

    Raises:
        ConfigError: there are checkpoints, and none is whole.
    """
    damage: list[str] = []
    for checkpoint in reversed(complete_checkpoints(directory)):
        wrong = _damage(checkpoint, contents)
        if wrong is None:
            return checkpoint, damage
        damage.append(f"{checkpoint}: {wrong}")
    if damage:
        raise ConfigError(
            f"No checkpoint is whole. {'; '.join(damage)}. Restore the files, or choose another -o to start over."
        )
    return None, []


def _damage(checkpoint: Path, contents: bool) -> str | None:
    try:
        marker = read_marker(checkpoint)
        if not all(isinstance(marker["fingerprint"][key], int) for key in KEPT):
            return f"{MARKER} holds no whole numbers under {' and '.join(KEPT)}"
        return find_damage(checkpoint, marker["files"], contents=contents)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__}: {error})"


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """Return {"fingerprint", "files"} of a complete checkpoint."""
    marker: dict[str, Any] = read_json(checkpoint / MARKER, ConfigError, want=dict)
    return marker


def keep_last(directory: Path, count: int) -> None:
    """Delete all complete checkpoints but the last `count`."""
    for old in complete_checkpoints(directory)[:-count]:
        shutil.rmtree(old, ignore_errors=True)


def drop_after(directory: Path, last: Path | None) -> None:
    """Delete checkpoints whose writing was interrupted, and those after `last`, if the run goes on from it."""
    for path in directory.glob(f"{_PREFIX}*"):
        is_later = last is not None and _step(path) > _step(last)
        if is_later or not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)


def check_fingerprint(checkpoint: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint with what `checkpoint`'s run keeps (`KEPT`).

    Raises:
        ConfigError: `checkpoint` belongs to another run (the first difference is named), or is beyond the last step.
    """
    then = read_marker(checkpoint)["fingerprint"]
    now = json.loads(json.dumps(fingerprint, default=str))
    for key in [*then, *(key for key in now if key not in then)]:
        if key not in _NOT_COMPARED and then.get(key) != now.get(key):
            raise ConfigError(
                f"{checkpoint} was made with {key} {then.get(key)}, this run has {now.get(key)}: they would not "
                "continue one another. Use the same settings, or another -o for a new run."
            )
    if _step(checkpoint) > fingerprint["last_step"]:
        raise ConfigError(
            f"{checkpoint} is beyond --num-steps {fingerprint['last_step']}: give at least {_step(checkpoint)}."
        )
    return {**fingerprint, "warmup_used": then["warmup_used"], "threads": then.get("threads", now["threads"])}


# --- where a run begins -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: from which it goes on; None for a new run, and one stopped before its first checkpoint.
        fingerprint: its own, with what it keeps of the checkpoint's.
        notes: what the user should know: damaged checkpoints that were passed over, what a longer run keeps.
    """

    checkpoint: Path | None
    fingerprint: dict[str, Any]
    notes: tuple[str, ...] = ()


def find_start(
    config: TrainingConfig, directory: Path, fingerprint: dict[str, Any], prolonged: Path | None = None
) -> Beginning:
    """Return where the run begins: all processes agree on that and on everything that decides the numbers.

    Nothing is deleted.

    Args:
        directory: checkpoints of the run.
        prolonged: last checkpoint of a finished run, to go on from if `directory` has none.

    Raises:
        ConfigError: the last whole checkpoint belongs to another run, none is whole, or the processes disagree.
    """
    last, damage = _find_checkpoint(config, directory, prolonged, contents=True)
    compared = {key: value for key, value in fingerprint.items() if key not in _NOT_COMPARED}
    agree({"the checkpoint to resume": last.name if last else "none", **compared, "num_steps": config.num_steps})
    if last is None:
        return Beginning(None, fingerprint)
    fingerprint = check_fingerprint(last, fingerprint)
    passed_over = [f"Passed over {text}. The run goes on from {last.name}." for text in damage]
    return Beginning(last, fingerprint, (*passed_over, *_changes(last, fingerprint)))


def _find_checkpoint(
    config: TrainingConfig, directory: Path, prolonged: Path | None, *, contents: bool
) -> tuple[Path | None, list[str]]:
    if not config.resume:
        return None, []
    last, damage = last_whole_checkpoint(directory, contents=contents)
    if last is None and prolonged is not None:
        return last_whole_checkpoint(prolonged.parent, contents=contents)
    return last, damage


def check_resume(
    config: TrainingConfig, directory: Path, fingerprint: dict[str, Any], prolonged: Path | None = None
) -> None:
    """Raise ConfigError if the last checkpoint is another run's: what `find_start` finds, before processes start."""
    last, _ = _find_checkpoint(config, directory, prolonged, contents=False)
    if last is not None:
        check_fingerprint(last, fingerprint)


def _changes(checkpoint: Path, fingerprint: dict[str, Any]) -> list[str]:
    """Return what a run that is prolonged or cut short should know, in a sentence."""
    before, now = read_marker(checkpoint)["fingerprint"]["last_step"], fingerprint["last_step"]
    if before == now:
        return []
    warmup = fingerprint["warmup_used"]
    return [
        f"The run was begun for {before} steps and goes on from {checkpoint.name} to step {now}. Its warm-up stays "
        f"{warmup} step{'' if warmup == 1 else 's'}; the learning rate is constant after it."
    ]
