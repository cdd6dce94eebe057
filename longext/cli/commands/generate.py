"""Continue a text with a model or a compressor.

A plain model reads inside its window, a compressor a context of any length.

Example: longext generate out/uio --context book.txt --save-memory book.safetensors --prompt "In the end,"
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import typer

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.compressor.config import GenerateConfig

if TYPE_CHECKING:
    from longext.compressor.writing.pieces import Generated


def run(config: GenerateConfig, as_json: bool) -> None:
    """Read the context, write the continuation as it comes, say how it went."""
    from longext.cli.output import show
    from longext.compressor.writing.generation import open_writer
    from longext.manifest import result_record
    from longext.report.console import progress, say

    writer = open_writer(config)
    started = time.perf_counter()
    with progress("reading", writer.num_unread, "tokens") as advance:
        writer.read(advance)
    seconds = time.perf_counter() - started
    for note in writer.notes:
        say(note, aside=True)
    generated = writer.write((lambda _: None) if as_json else (lambda text: typer.echo(text, nl=False)))
    if as_json:
        named = config.model or writer.opened.model.name  # a memory names its own
        record = result_record("generate", named, read_seconds=seconds, **dataclasses.asdict(generated))
        show(record, [], as_json=True)
    else:
        typer.echo()
        say(describe(generated), aside=True)


def describe(generated: Generated) -> str:
    """Return one line: what was read, what it became, how fast the rest was written."""
    from longext.report.commands.model import megabytes

    parts = [f"{generated.num_read:,} tokens read"]
    memory = generated.memory
    if memory is not None:
        lost = ("forgotten", "thinned")
        counts = [f"{memory[f'num_{name}']:,} tokens {name}" for name in lost if memory.get(f"num_{name}")]
        forgotten = f" (the first {', '.join(counts)})" if counts else ""
        size = f"{memory['num_slots']:,} slots, {megabytes(memory['num_bytes'])}" if "num_slots" in memory else ""
        name = f"memory {memory['spec']}" if "spec" in memory else f"memory at {memory['ratio']}x"
        parts.append(f"{name}{': ' if size else ''}{size}{forgotten}")
    thought = f", {generated.num_thought_tokens:,} of them a thought" if generated.num_thought_tokens else ""
    parts.append(f"{len(generated.tokens):,} written{thought}")
    if generated.tokens_per_second:
        parts[-1] += f" at {generated.tokens_per_second:.1f} tokens/s"
    return "; ".join(parts) + "."


COMMANDS.register("generate", Command(config=GenerateConfig, run=run, extras=("eval",)))
