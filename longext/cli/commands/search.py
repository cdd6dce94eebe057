"""Search RoPE frequencies for a longer context on your own text, without training.

Numbers are hidden in long samples of the text; candidates are judged by the loss on their digits, and the best one is
compared with YaRN on text and prompts that the search has not seen. Writes factors, a picture and a checkpoint.

Example: longext search books-5m --target-length 1024 --evaluations 16 --num-samples 4
"""

from __future__ import annotations

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.searching.config import SearchConfig


def run(config: SearchConfig, as_json: bool) -> None:
    """Search, write, show; an interrupted search keeps its journal, and the same command goes on from it."""
    from longext.cli.output import open_output, show
    from longext.models.answer_file import holds_answers
    from longext.report.commands.search import CHECKPOINT, journal_of, point_line, search_and_write, search_table
    from longext.report.console import progress, say
    from longext.report.results import output_directory

    output = output_directory(config.output, "search", config.model)
    open_output(output, config)
    try:
        found, written = search_and_write(config, output, progress, lambda line: say(line, aside=as_json))
    except KeyboardInterrupt:
        if holds_answers(journal_of(output)):
            named = "" if config.output else f" with -o {output}"
            say(f"The search so far is in {journal_of(output)}: the same command{named} goes on from it.", aside=True)
        raise
    notes = [point_line(found.record), f"Check it: longext verify {output / CHECKPOINT}"]
    show(found.record, [search_table(found.record)], as_json=as_json, notes=notes, warnings=written.notes)
    say(f"Results: {output} ({', '.join(written.names)})", aside=as_json)


COMMANDS.register("search", Command(config=SearchConfig, run=run, needs=("target_length",), extras=("eval",)))
