"""Decide whether a model passes: accuracy and perplexity at given lengths, with as little asking as certainty allows.

Exits with 0 if every check passes, 1 if one fails, 2 for a mistake in what was given. For pull requests: in GitHub
Actions the table goes into the summary of the step.

Example: longext gate books-5m --method yarn --factor 8 --lengths 512,2048 --baseline books-5m
"""

from __future__ import annotations

import functools

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.report.config import GateConfig


def run(config: GateConfig, as_json: bool) -> None:
    """Measure, write the results and the summary, print the verdict first; exit with 1 if it is a failure."""
    from longext.cli.output import deliver, open_output
    from longext.report.commands.gate import Verdict, append_summary, gate_tables, headline, run_gate
    from longext.report.console import progress
    from longext.report.results import Contents, output_directory

    output = output_directory(config.output, "gate", config.model)
    open_output(output, config)
    record = run_gate(config, progress)
    tables = functools.partial(gate_tables, record)
    contents = Contents(command="gate", config=config, record=record, tables=tables)
    deliver(output, contents, as_json=as_json, lead=[headline(record)])
    append_summary(config, record)
    Verdict(record).require()


COMMANDS.register("gate", Command(config=GateConfig, run=run, extras=("eval",)))
