"""Put results of any evaluations side by side.

A table for what is comparable, pictures, HTML, Markdown, CSV. Results whose protocol or data differ are in tables of
their own, with the fields that differ.

Example: longext report results/ -o report
"""

from __future__ import annotations

import functools

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.report.config import ReportConfig


def run(config: ReportConfig, as_json: bool) -> None:
    """Read the results, compare what is comparable, write and show."""
    from longext.cli.output import deliver_files, open_output
    from longext.report.build import csv_rows, make_report, report_record
    from longext.report.report_figures import report_figures
    from longext.report.report_page import report_page
    from longext.report.report_views import report_notes, report_tables, to_markdown
    from longext.report.results import output_directory
    from longext.report.tables import csv_text
    from longext.staging import check_apart

    output = output_directory(config.output, "report", None)
    open_output(output, config)
    report = make_report(config.results)
    for result in report.results:
        check_apart(output, result.file)
    pictures = functools.cache(lambda: report_figures(report))

    def in_markdown() -> str:
        return to_markdown(report, {key: [f"{name}.png" for name in group] for key, group in pictures().items()})

    deliver_files(
        output,
        "report",
        config,
        report_record(report),
        lambda: report_tables(report),
        lambda: {name: figure for figures in pictures().values() for name, figure in figures.items()},
        as_json=as_json,
        notes=report_notes(report),
        extra={
            "results.csv": csv_text(csv_rows(report)),
            "report.html": lambda: report_page(report, pictures()),
            "report.md": in_markdown,
        },
    )


COMMANDS.register("report", Command(config=ReportConfig, run=run))
