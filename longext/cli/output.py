"""How every evaluation ends: files first, then tables and the path, or the record as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longext.report.results import Contents
    from longext.report.tables import Table


# settings that may name what a command reads, and their values that name no file
_READ = (
    "model base against baseline evaluator adapter init memory data eval_data predictions include_path key_tokens "
    "essays haystack filler squad hotpotqa factors"
).split()
_NO_FILES = ("sample", "book", "landmark", "noise", "needles")


def open_output(output: Path, config: Any, *read: Path) -> None:
    """Check the output of a command before its work, and hold it until the command ends.

    Args:
        config: `force` says whether an old output may be replaced; what its other fields name is not overwritten.
        read: further files and directories that the command reads.

    Raises:
        ConfigError: nothing can be written there, something would be lost, or another process is at work there.
    """
    from longext.checkpoint.bundled import BUNDLED_MODELS
    from longext.staging import check_apart, hold_output

    named = {getattr(config, name, None) or "" for name in _READ} - {*BUNDLED_MODELS, *_NO_FILES}
    # a memory may be a directory and a ratio; os.path takes any text
    paths = {os.path.expanduser(part) for name in named for part in (name, name.partition("@")[0]) if part}  # noqa: PTH111
    for path in (*(Path(path) for path in paths if os.path.exists(path)), *read):  # noqa: PTH110
        check_apart(output, path)
    hold_output(output, config.force)


def deliver(
    output: Path, contents: Contents, *, as_json: bool, lead: Sequence[str] = (), notes: Sequence[str] = ()
) -> None:
    """Write the results directory, then print `lead`, tables, notes and its path; see `show`."""
    from longext.report.console import say, working
    from longext.report.results import write_results

    with working(f"writing {output}"):
        written = write_results(output, contents)
    for line in lead:
        say(line, aside=as_json)
    show(contents.record, written.tables, as_json=as_json, notes=notes, warnings=written.notes)
    say(f"Results: {output} ({', '.join(written.names)})", aside=as_json)


def show(
    record: Mapping[str, Any],
    tables: Sequence[Table],
    *,
    as_json: bool,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Print tables and notes; or the record as JSON, alone on standard output, and notes on standard error.

    Args:
        warnings: further notes, on standard error either way.
    """
    from longext.report.console import print_table, say, stdout
    from longext.report.results import dump_json

    if as_json:
        stdout().out(dump_json(record), highlight=False)
    else:
        for table in tables:
            print_table(table)
    for note in notes:
        say(note, aside=as_json)
    for warning in warnings:
        say(warning, aside=True)
