"""Print the command that serves a model in an engine, with the flags that its RoPE needs.

One line says so where the engine computes something else.

Example: longext serve-config out/books-5m-4k --engine vllm --version 0.33.0

A model as it is, extended by flags: longext serve-config MODEL --engine sglang --method yarn --factor 4
"""

from __future__ import annotations

import dataclasses

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.conversion.config import ServeConfig


def run(config: ServeConfig, as_json: bool) -> None:
    """Look the engine up, print the command, say what is to be known on standard error."""
    from longext.cli.output import show
    from longext.conversion.serving import serving
    from longext.manifest import result_record

    found = serving(config)
    record = result_record("serve-config", model=config.model, **dataclasses.asdict(found))
    show(record, [], as_json=as_json, notes=[] if as_json else [found.command], warnings=found.notes)


COMMANDS.register("serve-config", Command(config=ServeConfig, run=run, takes_recipes_of="", has_recipe=False))
