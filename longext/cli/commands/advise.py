"""Say which method to take for a length: a short trial of all on your own text, the answer in two sentences first.

Example: longext advise books-5m --target-length 4096 --data my-text.txt --minutes 5
"""

from __future__ import annotations

import functools

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.concepts import CONCEPTS
from longext.report.config import AdviseConfig


def run(config: AdviseConfig, as_json: bool) -> None:
    """Measure, write the results, then print the answer, the tables and the command to run next."""
    from longext.cli.output import deliver, open_output
    from longext.evals.candidates import try_methods
    from longext.report.commands.advise import Advice, advice_figures, advice_tables
    from longext.report.console import progress, say
    from longext.report.results import Contents, output_directory

    output = output_directory(config.output, "advise", config.model)
    open_output(output, config)
    record = try_methods(config, progress, functools.partial(say, aside=True))
    advice = Advice(record)
    contents = Contents(
        command="advise",
        config=config,
        record=record,
        tables=functools.partial(advice_tables, record),
        figures=functools.partial(advice_figures, record),
        extra={"answer.txt": "\n".join([*advice.answer, "", *advice.commands, ""])},
    )
    left_out = [text.partition(":")[0] for text in record["left_out"]]
    notes = [f"Left out (result.json says why): {', '.join(left_out)}."] if left_out else []
    notes += [f"{CONCEPTS['perplexity']} {CONCEPTS['passkey']}"]
    notes += [f"Next: {text}" for text in advice.commands]
    deliver(output, contents, as_json=as_json, lead=advice.answer, notes=notes)


COMMANDS.register("advise", Command(config=AdviseConfig, run=run, extras=("eval",)))
