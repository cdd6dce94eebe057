"""A training run from its settings to its output directory: for the commands that train, and for Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.errors import ConfigError
from longext.evals.base import Progress
from longext.processes import group as processes
from longext.report.commands.training import TrainingReport
from longext.report.results import Written
from longext.staging import replace_directory
from longext.threads import set_threads
from longext.training.callbacks import Measure
from longext.training.directory import check_directories, finished_run, kept_once_started, open_run
from longext.training.loading import training_device
from longext.training.run import Run, RunPlan, Training, TrainingResult, set_up


@dataclass(frozen=True)
class Trainer:
    """What `finetune` and `compress-train` differ in.

    Attributes:
        make_plan: checks the config and returns the plan of the run.
        measuring: makes of the loaded run what is measured while it trains.
        report: how its results look.
    """

    make_plan: Callable[[Any], RunPlan]
    measuring: Callable[[Any], Measure | None]
    report: TrainingReport


@dataclass(frozen=True)
class Planned:
    """A run that was checked, with the lock on its output.

    Attributes:
        work: its working directory; with no output asked for, where nothing is written.
        prolonged: the last checkpoint of a finished run that it goes on from.
    """

    trainer: Trainer
    config: Any
    plan: RunPlan
    output: Path
    work: Path
    prolonged: Path | None


def plan_run(config: Any, trainer: Trainer, *, writes: bool = True) -> Planned:
    """Check a run and lock its output; no weights are read.

    Raises:
        ConfigError, CheckpointError, DataError: something given is missing or cannot be used.
    """
    missing = ["--data (text file, folder, .jsonl, .parquet, Hub dataset id, or sample)"] if not config.data else []
    if config.output is None and writes:
        missing.append("an output directory with -o")
    if missing:
        raise ConfigError(f"Give {' and '.join(missing)}.")
    set_threads(config.threads)
    plan, output = trainer.make_plan(config), Path(config.output or "out")
    work = output if config.output is None else check_directories(config, output, plan.source)
    return Planned(trainer, config, plan, output, work, finished_run(config, output) if writes else None)


def train_and_write(
    planned: Planned, load: Callable[[RunPlan, Path], Run], progress: Progress, on_start: Callable[[Training], None]
) -> tuple[TrainingResult, Written, dict[str, Any]] | None:
    """Train, write the output directory, and return the result, its files and its record.

    Of several processes the main one writes and returns; the others return None.

    Args:
        load: loads the run of a plan in its working directory.
        on_start: called in the main process before the first step.
    """
    config, trainer = planned.config, planned.trainer
    processes.start_distributed(training_device(config), config.collective_timeout)
    is_main = processes.is_main_process()
    with kept_once_started(planned.work):
        run = load(planned.plan, planned.work)
        training = set_up(run, trainer.measuring(run), planned.prolonged)
        if is_main:
            open_run(config, planned.work, planned.output, trainer.report.command)
            on_start(training)
        processes.wait_for_all()
        bar = progress(f"{trainer.report.command} {config.model}", planned.plan.num_tokens, "tokens")
        with bar if is_main else contextlib.nullcontext() as advance:
            result = training.train(advance)
    written = None
    if is_main:
        written = trainer.report.write(config, result)
        replace_directory(result.directory, planned.output)
    processes.wait_for_all()
    return (result, *written) if written else None
