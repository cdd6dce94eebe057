"""How every evaluation ends: files first, then tables and the path, or the record as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.reporting.tables import Table


def deliver(
    output: Path,
    command: str,
    config: Any,
    record: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    *,
    as_json: bool,
    notes: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write the result directory, then print tables, notes and its path; see `show`.

    Args:
        figures: name -> figure, saved as <name>.png.
        extra: further text files by name.
    """
    from longext.reporting.console import say
    from longext.reporting.results import write_results

    write_results(output, command, config, record, tables, figures, extra)
    show(record, tables, as_json=as_json, notes=notes)
    names = ["result.json", "table.md", *(extra or {}), *(f"{name}.png" for name in figures)]
    say(f"Results: {output} ({', '.join(names)})", aside=as_json)


def show(record: Mapping[str, Any], tables: Sequence[Table], *, as_json: bool, notes: Sequence[str] = ()) -> None:
    """Print tables and notes; or the record as JSON, alone on standard output, and notes on standard error."""
    from longext.reporting.console import print_table, say, stdout
    from longext.reporting.results import dump_json

    if as_json:
        stdout().out(dump_json(record), highlight=False)
    else:
        for table in tables:
            print_table(table)
    for note in notes:
        say(note, aside=as_json)
