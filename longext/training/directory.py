"""The working directory of a training run, `<output>.running`: locked first, then made, or resumed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from longext.errors import ConfigError
from longext.manifest import MANIFEST_NAME, RECIPE_NAME, read_manifest, write_manifest
from longext.processes.group import is_main_process
from longext.staging import check_output, hold_name, hold_output, is_ours, resolve_output
from longext.training.callbacks import METRICS_NAME, read_metrics
from longext.training.checkpoints import CHECKPOINTS, complete_checkpoints
from longext.training.config import TrainingConfig


def working_directory(output: Path) -> Path:
    """Return where the run works whose result will be `output`."""
    place = resolve_output(output) if output.is_symlink() or not output.name else output
    return place.with_name(f"{place.name}.running")


def check_directories(config: TrainingConfig, output: Path, source: Path) -> Path:
    """Lock the output of a run, check that it and the working directory may be written, and return the latter.

    Nothing is changed. The lock is held until the command ends; of several processes the main one has it.

    Raises:
        ConfigError: something would be lost, there is nothing to resume, or another process is at work there.
    """
    work = working_directory(output)
    if not is_main_process():
        return work
    hold_name(output)
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ConfigError(f"{work}, where the run would work, is no directory. Choose another -o.")
    if config.resume:
        _check_resume(config, output, work, source)
        return work
    is_free = not work.exists() or not any(work.iterdir()) or _is_unstarted(work, config)
    if not is_free and not (config.force and is_ours(work)):
        raise ConfigError(f"{work} holds an unfinished run: add --resume to go on with it, or choose another -o.")
    check_output(output, config.force, protected=source)
    hold_output(output, config.force)
    return work


def _check_resume(config: TrainingConfig, output: Path, work: Path, source: Path) -> None:
    finished = finished_run(config, output)
    if finished is not None and not (holds_progress(work) and not read_manifest(work).get("prolongs")):
        step = int(finished.name.rpartition("-")[2])
        if config.num_steps <= step:
            raise ConfigError(f"{output} is a finished run of {step} steps. To prolong it give more --num-steps.")
        check_output(output, True, protected=source)
        return
    if not work.is_dir() or not any(work.iterdir()):
        if output.exists() and any(output.iterdir()):
            raise ConfigError(
                f"Nothing to resume: there is no {work}, and {output} is no finished run with checkpoints to prolong. "
                "Choose another -o."
            )
        raise ConfigError(f"Nothing to resume: there is no {work}. Leave --resume out to start the run.")
    if not is_ours(work):
        raise ConfigError(f"{work}, which would be resumed, was not written by longext. Choose another -o.")
    check_output(output, config.force, protected=source)


def finished_run(config: TrainingConfig, output: Path) -> Path | None:
    """Return the last checkpoint of the finished training at `output` that `config` may prolong, or None."""
    if not config.resume or read_manifest(output).get("state") != "finished":
        return None
    checkpoints = complete_checkpoints(resolve_output(output) / CHECKPOINTS)
    return checkpoints[-1] if checkpoints else None


def holds_progress(work: Path) -> bool:
    """Return True if a working directory holds more than a run writes before its first step."""
    if not work.is_dir():
        return False
    metrics = work / METRICS_NAME
    if metrics.is_file() and any("loss" in line for line in read_metrics(metrics)):
        return True
    others = {path.name for path in work.iterdir()} - {MANIFEST_NAME, RECIPE_NAME, METRICS_NAME, CHECKPOINTS}
    return bool(others) or bool(complete_checkpoints(work / CHECKPOINTS))


def _is_unstarted(work: Path, config: TrainingConfig) -> bool:
    """True for what a kill before the first step leaves of a run of the same command."""
    return set(read_manifest(work).get("config", ())) == set(vars(config)) and not holds_progress(work)


@contextlib.contextmanager
def kept_once_started(work: Path) -> Iterator[None]:
    """Remove the working directory that a run made and failed in before its first step: there is nothing in it."""
    before = work.stat().st_ino if work.is_dir() else None
    try:
        yield
    except BaseException:
        if is_main_process() and work.is_dir() and work.stat().st_ino != before and not holds_progress(work):
            shutil.rmtree(work, ignore_errors=True)
        raise


def open_run(config: TrainingConfig, work: Path, output: Path, command: str) -> None:
    """Make the working directory, or take up the one that is there; a run that is prolonged brings its metrics."""
    if config.resume and holds_progress(work):
        return
    if work.is_dir():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    prolonged = finished_run(config, output)
    if prolonged is not None and (resolve_output(output) / METRICS_NAME).is_file():
        shutil.copyfile(resolve_output(output) / METRICS_NAME, work / METRICS_NAME)
    write_manifest(work, command, config, state="running", prolongs=prolonged is not None)
