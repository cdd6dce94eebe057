"""Put results of any evaluations side by side.

A verdict in words, a table for what is comparable, pictures, HTML, Markdown, CSV. Results whose protocol or data differ
are in tables of their own, with the fields that differ.

Example: longext report results/ -o report
"""

from __future__ import annotations

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.report.config import ReportConfig


def run(config: ReportConfig, as_json: bool) -> None:
    """Read the results, compare what is comparable, write and show."""
    from longext.cli.output import deliver, open_output
    from longext.report.build import build_report, report_record
    from longext.report.console import working
    from longext.report.find import find_results
    from longext.report.notes import report_notes, verdict
    from longext.report.outcome import Rendered
    from longext.report.page import report_files
    from longext.report.results import Contents, output_directory
    from longext.report.scores import result_file
    from longext.staging import check_apart

    output = output_directory(config.output, "report", None)
    open_output(output, config)
    with working("reading results"):
        report = build_report(*find_results(config.results))
    for result in report.results:
        check_apart(output, result_file(result.name))
    rendered = Rendered(report)
    contents = Contents(
        command="report",
        config=config,
        record=report_record(report),
        tables=rendered.tables,
        figures=rendered.figures,
        extra=report_files(rendered),
    )
    deliver(output, contents, as_json=as_json, lead=verdict(report), notes=report_notes(report))


COMMANDS.register("report", Command(config=ReportConfig, run=run, extras=("report",)))
