"""Compare extension methods in one run: perplexity, NLL by position, passkey, short-context price, HTML report.

Example: longext compare books-5m --methods none,linear,ntk,yarn,dynamic:alpha=8 --factor 8
"""

from __future__ import annotations

import dataclasses
import functools

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.errors import LongextError
from longext.report.config import CompareConfig


def run(config: CompareConfig, as_json: bool) -> None:
    """Measure every method, write the results and the report on them."""
    from longext.cli.evaluation import kept_answers
    from longext.cli.output import show
    from longext.cli.processes import scores_path, together
    from longext.evals.base import no_progress
    from longext.processes.launcher import is_main_process
    from longext.report.compare import compare_methods, write_comparison
    from longext.report.console import progress, say
    from longext.report.notes import verdict
    from longext.report.results import output_directory

    with together(config, output_directory(config.output, "compare", config.model)) as output:
        in_place = dataclasses.replace(config, output=str(output))
        if not is_main_process():
            compare_methods(in_place, no_progress)
            return
        with kept_answers([scores_path(output)], output, config):
            comparison = compare_methods(in_place, progress, functools.partial(say, aside=as_json))
            written = write_comparison(output, config, comparison)
    for line in verdict(comparison.rendered.report):
        say(line, aside=as_json)
    notes = [f"Report: {output / 'report.html'}"]
    show(comparison.record, written.tables, as_json=as_json, notes=notes, warnings=written.notes)
    say(f"Results: {output} ({', '.join(written.names)})", aside=as_json)
    if comparison.failed:
        told = "; ".join(f"{name}: {reason}" for name, reason in comparison.failed.items())
        raise LongextError(f"{len(comparison.failed)} of {len(config.methods)} methods failed. {told}")


COMMANDS.register("compare", Command(config=CompareConfig, run=run, extras=("eval", "report")))
