"""What an error advises must exist: every --option that a message names is one of the command that failed."""

from __future__ import annotations

import functools
import re

import typer

from longext.cli import app

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# `longext merge DIR --base MODEL` is advice about another command, and so are pip's, hf's and torchrun's options.
_OTHER_COMMAND = re.compile(r"(?:longext|pip|hf|torchrun|accelerate) [a-z][^:;)`'\n]*|`[^`]*`")


@functools.cache
def commands() -> dict[str, typer.core.TyperCommand]:
    """Return every command by its full name, as "eval ppl"."""

    def walk(group, before=()):
        for name in group.list_commands(None):
            command = group.get_command(None, name)
            if isinstance(command, typer.core.TyperGroup):
                yield from walk(command, (*before, name))
            else:
                yield " ".join((*before, name)), command

    return dict(walk(typer.main.get_command(app)))


def options_of(command: typer.core.TyperCommand) -> set[str]:
    """Return the spellings of a command's options, --help included."""
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}


def unknown_advice(args: list[str], message: str) -> list[str]:
    """Return the options in `message` that the command in `args` does not have; what the user typed is no advice."""
    known = commands()
    name = next((n for n in (" ".join(args[:2]), args[0] if args else "") if n in known), None)
    if name is None:
        return []
    typed = {arg.split("=")[0] for arg in args if arg.startswith("--")}
    advised = set(_OPTION.findall(_OTHER_COMMAND.sub("", message)))
    return sorted(advised - options_of(known[name]) - {"--debug", "--traceback"} - typed)
