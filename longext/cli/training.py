"""How `finetune` and `compress-train` run: planned once; then shown, or launched, or trained and written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from longext.cli.output import show
from longext.errors import ConfigError
from longext.models.threads import set_threads
from longext.report.console import print_table, progress, say, working
from longext.report.training import TrainingReport
from longext.staging import release_outputs, replace_directory
from longext.training import processes
from longext.training.callbacks import Measure
from longext.training.directory import check_directories, finished_run, kept_once_started, open_run
from longext.training.loading import training_device
from longext.training.run import Run, RunPlan, Training, TrainingResult, set_up

Measuring = Callable[[Any], "Measure | None"]


def run_training(
    config: Any,
    make_plan: Callable[[Any], RunPlan],
    measuring: Measuring,
    report: TrainingReport,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a training command, in this process or in several on this machine.

    Args:
        make_plan: checks the config and returns the plan of the run.
        measuring: makes of the loaded run what is measured while it trains.
        report: how its results look.
        dry_run: check and load everything, show the plan, train and write nothing.
        as_json: print the record on standard output, and everything else on standard error.
    """
    missing = ["--data (text file, folder, .jsonl, .parquet, Hub dataset id, or sample)"] if not config.data else []
    if config.output is None and not dry_run:
        missing.append("an output directory with -o")
    if missing:
        raise ConfigError(f"Give {' and '.join(missing)}.")
    set_threads(config.threads)
    plan, output = make_plan(config), Path(config.output or "out")
    work = output if config.output is None else check_directories(config, output, plan.source)
    if dry_run:
        run = _load(plan, work)
        measuring(run)
        record = run.record(0.0)
        notes = [*record["data"].get("notes", ()), "Dry run: nothing was trained."]
        show(record, [report.plan_table(record, config)], as_json=as_json, notes=notes)
        return
    prolonged = finished_run(config, output)
    if config.num_processes > 1 and not processes.is_launched():
        with working(f"reading {config.data}") as tell:
            plan.check_before_launch(work, prolonged, _tokens(config, tell))
        release_outputs()  # to the main one of the processes
        raise typer.Exit(processes.launch(config.num_processes, sys.argv[1:], grace=config.stop_grace))
    processes.start_distributed(training_device(config), config.collective_timeout)
    with kept_once_started(work):
        run = _load(plan, work)
        training = set_up(run, measuring(run), prolonged)
        result = _train(training, report, output, as_json)
    if processes.is_main_process():
        _finish(config, report, output, result, as_json)
    processes.wait_for_all()


def _load(plan: RunPlan, work: Path) -> Run:
    if not processes.is_main_process():
        return plan.load(work)
    with working(f"loading {plan.config.model}") as tell:
        return plan.load(work, _tokens(plan.config, tell))


def _tokens(config: Any, tell: Callable[[str], None]) -> Callable[[int], None]:
    return lambda tokens: tell(f"tokenising {config.data}: {tokens:,} tokens so far")


def _train(training: Training, report: TrainingReport, output: Path, as_json: bool) -> TrainingResult:
    """Make the working directory, show the plan, and train; of several processes the main one speaks."""
    config, plan, is_main = training.run.config, training.run.plan, processes.is_main_process()
    if is_main:
        open_run(config, training.run.directory, output, report.command)
        record = training.run.record(0.0)
        for note in training.beginning.notes:
            say(note, aside=True)
        if not as_json:
            print_table(report.plan_table(record, config))
        for note in record["data"].get("notes", ()):
            say(note, aside=as_json)
    processes.wait_for_all()
    bar = progress(f"{report.command} {config.model}", plan.num_tokens, "tokens")
    with bar if is_main else contextlib.nullcontext() as advance:
        return training.train(advance)


def _finish(config: Any, report: TrainingReport, output: Path, result: TrainingResult, as_json: bool) -> None:
    """Write manifest, card, table and picture next to the weights; give the directory its name; say what is next."""
    written, record = report.write(config, result)
    replace_directory(result.directory, output)
    show(record, written.tables[1:], as_json=as_json, warnings=written.notes)
    if not as_json:
        say(report.next_step(output))
