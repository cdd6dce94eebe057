"""Work out memory, time and money of a training run: what fits, how long rows can get, and in which ways.

Example: longext plan llama3-8b --length 1048576 --gpus 1xH200 --price-per-hour 3
"""

from __future__ import annotations

from pathlib import Path

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.planning.config import PlanConfig


def run(config: PlanConfig, *, as_json: bool) -> None:
    """Plan, measure if asked for, show; write too if a directory was named."""
    from longext.cli.output import deliver, open_output, show
    from longext.planning.fit import plan_record, plan_training
    from longext.report.commands.plan import memory_by_length, plan_tables, probe_table, record_with_probe
    from longext.report.results import Contents

    if config.output:
        open_output(Path(config.output), config)
    plan, probe = plan_training(config), None
    if config.probe:
        from longext.planning.builtin import config_directory
        from longext.planning.probe import probe_machine

        with config_directory(config.model, plan.source) as directory:
            probe = probe_machine(directory, plan.shape, plan.setup)
    record = record_with_probe(plan_record(plan), probe)
    tables = [*plan_tables(plan), *([probe_table(probe)] if probe else [])]
    notes = [f"note: {note}" for note in plan.notes()]
    if not config.output:
        show(record, tables, as_json=as_json, notes=notes)
        return
    contents = Contents(
        command="plan",
        config=config,
        record=record,
        tables=lambda: tables,
        figures=lambda: {"memory": memory_by_length(plan)},
    )
    deliver(Path(config.output), contents, as_json=as_json, notes=notes)


COMMANDS.register("plan", Command(config=PlanConfig, run=run))
