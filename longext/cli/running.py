"""The working directory of a training command: made, taken up again, and given its final name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longext.config import TrainingConfig
from longext.errors import ConfigError


def check_directories(config: TrainingConfig, output: Path, source: Path) -> Path:
    """Return the working directory of the run after checking that it and the output may be written."""
    from longext.staging import check_output, is_ours

    check_output(output, config.force, protected=source)
    work = output.with_name(f"{output.name}.running")
    exists = work.is_dir() and any(work.iterdir())
    if config.resume and not exists:
        raise ConfigError(f"Nothing to resume: there is no {work}. Leave --resume out to start the run.")
    if exists and not config.resume and not (config.force and is_ours(work)):
        raise ConfigError(f"{work} holds an unfinished run: add --resume to go on with it, or --force to start over.")
    return work


@contextlib.contextmanager
def kept_once_started(work: Path) -> Iterator[None]:
    """Remove the working directory of a run that failed before its first step: there is nothing in it."""
    import shutil

    from longext.training.callbacks import METRICS_NAME, read_metrics
    from longext.training.checkpoints import complete_checkpoints
    from longext.training.longlora import CHECKPOINTS
    from longext.training.processes import DirectoryInUse, is_main_process

    try:
        yield
    except DirectoryInUse:
        raise  # it is another run's
    except BaseException:
        metrics = work / METRICS_NAME
        started = metrics.is_file() and any("loss" in line for line in read_metrics(metrics))
        if is_main_process() and not started and not complete_checkpoints(work / CHECKPOINTS):
            shutil.rmtree(work, ignore_errors=True)
        raise


def open_run(config: TrainingConfig, work: Path, command: str) -> Any:
    """Make the working directory, or take up the one that is there; return what holds its lock."""
    import shutil

    from longext.manifest import write_manifest
    from longext.training.processes import hold_directory

    lock = hold_directory(work) if work.is_dir() else None
    if work.is_dir() and not config.resume:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        write_manifest(work, command, config, state="running")
        lock = hold_directory(work)
    return lock


def close_run(work: Path, output: Path, force: bool) -> None:
    """Give a finished run's directory its final name."""
    from longext.staging import replace_directory

    (work / ".lock").unlink(missing_ok=True)
    replace_directory(work, output, force)
