"""How `finetune` and `compress-train` run: planned once; then shown, or launched, or trained and written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from longext.cli.output import show
from longext.processes import group as processes
from longext.report.commands.runs import Planned, Trainer, plan_run, train_and_write
from longext.report.console import print_table, progress, say, working
from longext.staging import release_outputs
from longext.training.run import Run, RunPlan, Training


def run_training(config: Any, trainer: Trainer, *, dry_run: bool, as_json: bool) -> None:
    """Run a training command, in this process or in several on this machine.

    Args:
        dry_run: check and load everything, show the plan, train and write nothing.
        as_json: print the record on standard output, and everything else on standard error.
    """
    planned = plan_run(config, trainer, writes=not dry_run)
    if dry_run:
        _show_plan(planned, as_json)
        return
    if config.num_processes > 1 and not processes.is_launched():
        with working(f"reading {config.data}") as tell:
            planned.plan.check_before_launch(planned.work, planned.prolonged, _tokens(config, tell))
        release_outputs()  # to the main one of the processes
        raise typer.Exit(processes.launch(config.num_processes, sys.argv[1:], grace=config.stop_grace))

    def start(training: Training) -> None:
        record = training.run.record(0.0)
        for note in training.beginning.notes:
            say(note, aside=True)
        if not as_json:
            print_table(trainer.report.plan_table(record, config))
        for note in record["data"].get("notes", ()):
            say(note, aside=as_json)

    trained = train_and_write(planned, _load, progress, start)
    if trained is not None:
        _, written, record = trained
        show(record, written.tables[1:], as_json=as_json, warnings=written.notes)
        if not as_json:
            say(trainer.report.next_step(planned.output))


def _show_plan(planned: Planned, as_json: bool) -> None:
    run = _load(planned.plan, planned.work)
    planned.trainer.measuring(run)
    record, config = run.record(0.0), planned.config
    notes = [*record["data"].get("notes", ()), "Dry run: nothing was trained."]
    show(record, [planned.trainer.report.plan_table(record, config)], as_json=as_json, notes=notes)


def _load(plan: RunPlan, work: Path) -> Run:
    if not processes.is_main_process():
        return plan.load(work)
    with working(f"loading {plan.config.model}") as tell:
        return plan.load(work, _tokens(plan.config, tell))


def _tokens(config: Any, tell: Callable[[str], None]) -> Callable[[int], None]:
    return lambda tokens: tell(f"tokenising {config.data}: {tokens:,} tokens so far")
