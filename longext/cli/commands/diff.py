"""Compare two results: every score in both with its difference, and every setting that differs.

Comparable means that kind, protocol id and data hash agree; other settings that may matter are named.

Example: longext eval diff results/base results/yarn
"""

from __future__ import annotations

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.cli.output import show
from longext.report.config import DiffConfig


def run(config: DiffConfig, as_json: bool) -> None:
    """Print how two results differ."""
    from longext.report.commands.difference import compare_results, difference_notes, difference_tables
    from longext.report.scores import read_result

    a, b = config.a, config.b
    difference = compare_results(read_result(a), read_result(b))
    tables, notes = difference_tables(difference, a, b), difference_notes(difference)
    show(difference.to_json(a, b), tables, as_json=as_json, notes=notes)


COMMANDS.register("diff", Command(config=DiffConfig, run=run))
