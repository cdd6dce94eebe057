"""`longext eval diff`: two results of one kind beside each other."""

from __future__ import annotations

from typing import Annotated

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.output import show


@eval_app.command("diff")
def diff(
    a: Annotated[str, typer.Argument(help="Result directory, or its result.json.")],
    b: Annotated[str, typer.Argument(help="Another of the same kind.")],
    as_json: opt.Json = False,
) -> None:
    """Compare two results: every score in both with its difference, and every setting that differs.

    Comparable means that kind, protocol id and data hash agree; other settings that may matter are named.

    Example: longext eval diff results/base results/yarn
    """
    from longext.report.difference import compare_results
    from longext.report.difference_views import difference_notes, difference_tables
    from longext.report.scores import read_result

    found = compare_results(read_result(a), read_result(b))
    tables, notes = difference_tables(found, a, b), difference_notes(found)
    show(found.to_json(a, b), tables, as_json=as_json, notes=notes)
