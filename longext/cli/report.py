"""`longext report`: any results side by side."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.cli.output import deliver
from longext.evaluation.report_config import ReportConfig

if TYPE_CHECKING:
    from longext.evaluation.report import Report


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
    from longext.evaluation.report import csv_rows, make_report, report_record
    from longext.reporting.report_figures import report_figures
    from longext.reporting.report_page import report_page
    from longext.reporting.report_views import report_notes, report_tables, to_markdown
    from longext.reporting.results import output_directory
    from longext.staging import check_output

    output = output_directory(config.output, "report", None)
    check_output(output, config.force)
    found = make_report(config.results)
    _check_apart(output, found)
    pictures = report_figures(found)
    names = {key: [f"{name}.png" for name in figures] for key, figures in pictures.items()}
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(csv_rows(found))
    extra = {
        "report.html": report_page(found, pictures),
        "report.md": to_markdown(found, names),
        "results.csv": text.getvalue(),
    }
    deliver(
        output,
        "report",
        config,
        report_record(found),
        report_tables(found),
        {name: figure for figures in pictures.values() for name, figure in figures.items()},
        as_json=as_json,
        notes=report_notes(found),
        extra=extra,
    )


def _check_apart(output: Path, found: Report) -> None:
    """Raise ConfigError where --force would replace a result that the report reads."""
    from longext.errors import ConfigError

    held = next((own.file for own in found.results if output.resolve() in own.file.resolve().parents), None)
    if held is not None:
        raise ConfigError(
            f"The output {output} holds {held}, which the report is made of. Choose another -o directory."
        )
