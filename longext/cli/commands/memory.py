"""Read documents once and keep their memory in a file; say what a file holds.

`build` reads documents with a memory (--memory: a trained compressor, thinned raw keys, a KV policy) and writes a file
that `generate`, `chat` and Python go on from. `inspect` says what is in a file, without loading anything.

Example: longext memory build books/ --memory out/memory@8 -o corpus.memory
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.compressor.config import BuildConfig

if TYPE_CHECKING:
    from longext.report.tables import Table


def run(config: BuildConfig, as_json: bool) -> None:
    """Build or inspect, and show what the file holds."""
    from longext.cli.output import show
    from longext.compressor.writing.building import Builder, check_build, describe
    from longext.manifest import result_record
    from longext.report.console import progress, say

    check_build(config)
    if config.action == "inspect":
        held = describe(config.sources[0])
        show(result_record("memory", held["model"], memory=held), [memory_table(held)], as_json=as_json)
        return
    builder = Builder(config)
    with progress("reading", builder.num_unread, "tokens") as advance:
        held = builder.build(advance)
    notes = held.pop("notes")
    show(result_record("memory", held["model"], memory=held), [memory_table(held)], as_json=as_json, notes=notes)
    say(f'Wrote {held["file"]}. Next: longext generate --memory {held["file"]} --prompt "..."', aside=as_json)


def memory_table(held: dict[str, Any]) -> Table:
    """Return what a memory file holds, one property a row."""
    from longext.report.commands.model import megabytes
    from longext.report.tables import Table

    documents = held["documents"]
    names = ", ".join(f"{one['name']} ({one['num_tokens']:,})" for one in documents[:5])
    more = f" and {len(documents) - 5:,} more" if len(documents) > 5 else ""
    rows = [
        ("written with", f"--memory {held['memory']}"),
        ("model", f"{held['model']}{' + ' + held['method'] if held['method'] else ''}"),
        ("fingerprint", held["base_weights"]),
        ("tokens", f"{held['num_tokens']:,} in segments of {held['segment']:,}"),
        ("slots", f"{held['num_slots']:,}{_ratios(held)}"),
        ("bytes", megabytes(held["num_bytes"])),
        ("documents", f"{names}{more}" if documents else "not named"),
        ("open turn", held["turn"] or "none: a text goes on"),
    ]
    return Table("", (held["file"], held["schema"]), rows, left=frozenset({1}))


def _ratios(held: dict[str, Any]) -> str:
    """Return at which ratios the memories are held, those that were thinned too."""
    if not held.get("held"):
        return ""
    ratios = sorted(set(held["held"]))
    return f" at {', '.join(f'{ratio}x' for ratio in ratios)}"


COMMANDS.register("memory", Command(config=BuildConfig, run=run, extras=("eval",), has_recipe=False))
