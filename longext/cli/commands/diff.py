"""Compare two results.

Every score in both with its difference, and every setting that differs.
Comparable means that kind, protocol id and data hash agree; other settings that may matter are named.

Example: longext eval diff results/base results/yarn
"""

from __future__ import annotations

from dataclasses import dataclass

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.settings import option


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """`longext diff`: two results of one kind."""

    a: str = option(help="Result directory, or its result.json.", argument=True)
    b: str = option(help="Another of the same kind.", argument=True)


def run(config: DiffConfig, as_json: bool) -> None:
    """Read both, compare, show."""
    from longext.cli.output import show
    from longext.report.difference import compare_results
    from longext.report.difference_views import difference_notes, difference_tables
    from longext.report.scores import read_result

    compared = compare_results(read_result(config.a), read_result(config.b))
    tables = difference_tables(compared, config.a, config.b)
    show(compared.to_json(config.a, config.b), tables, as_json=as_json, notes=difference_notes(compared))


COMMANDS.register("diff", Command(config=DiffConfig, run=run))
