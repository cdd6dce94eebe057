"""`longext report`: any results side by side."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.cli.output import deliver, open_output
from longext.report.config import ReportConfig


@app.command("report")
def report(
    ctx: typer.Context,
    results: Annotated[
        list[str] | None,
        typer.Argument(
            help="Result directories, directories that hold some, or result.json files.", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory of the report (default: results/report-<time>).")
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Put results of any evaluations side by side: a table for what is comparable, pictures, HTML, Markdown, CSV.

    Results whose protocol or data differ stand in tables of their own, with the fields that differ.

    Example: longext report results/ -o report
    """
    _run(opt.config_from(ctx, ReportConfig, recipe, settings), as_json)


def _run(config: ReportConfig, as_json: bool) -> None:
    from longext.report.build import csv_rows, make_report, report_record
    from longext.report.report_figures import report_figures
    from longext.report.report_page import report_page
    from longext.report.report_views import report_notes, report_tables, to_markdown
    from longext.report.results import output_directory
    from longext.report.tables import csv_text
    from longext.staging import check_apart

    output = output_directory(config.output, "report", None)
    open_output(output, config)
    found = make_report(config.results)
    for own in found.results:
        check_apart(output, own.file)
    pictures = functools.cache(lambda: report_figures(found))

    def in_markdown() -> str:
        return to_markdown(found, {key: [f"{name}.png" for name in own] for key, own in pictures().items()})

    deliver(
        output,
        "report",
        config,
        report_record(found),
        lambda: report_tables(found),
        lambda: {name: figure for figures in pictures().values() for name, figure in figures.items()},
        as_json=as_json,
        notes=report_notes(found),
        extra={
            "results.csv": csv_text(csv_rows(found)),
            "report.html": lambda: report_page(found, pictures()),
            "report.md": in_markdown,
        },
    )
