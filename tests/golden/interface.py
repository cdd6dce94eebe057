"""How commands are spelled: their options and arguments, and whether a command line parses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_NOTATION = re.compile(r"\w\||\[\w|\bCOMMAND\b|--help|^longext eval$|^longext eval\.|\s{2,}\d")
_PLACEHOLDER = re.compile(r"N|\{\w+\}|\$.*")  # of the documentation, a benchmark, a shell script


def stored_options() -> dict[str, dict[str, list[str]]]:
    """Return command -> "options", "arguments" (every spelling), and "recipe" (the keys of a recipe and of --set)."""
    found: dict[str, dict[str, list[str]]] = json.loads((HERE / "options.json").read_text(encoding="utf-8"))
    return found


def stored_commands() -> list[str]:
    """Return the command lines of documentation, recipes and benchmarks, one line each."""
    return (HERE / "commands.txt").read_text(encoding="utf-8").splitlines()


def command_lines(text: str) -> list[str]:
    """Return the command lines of longext in a page of Markdown: in its blocks of code and between its backticks.

    Left out are notations (`longext eval ppl|passkey`, `longext recipes [list|show|copy]`), groups, and measured times.
    """
    blocks = [block.partition("\n")[2] for block in re.findall(r"```(.*?)```", text, re.DOTALL)]
    blocks = [block for block in blocks if not block.startswith("longext/")]  # the tree of the package
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))
    found = [match[1].strip() for line in lines if (match := re.search(r"(?:^|\s|/)(longext\s+[a-z].*)", line))]
    return [line for line in found if not _NOTATION.search(line)]


def spellings() -> dict[str, dict[str, list[str]]]:
    """Return command -> its options (long and short) and positional arguments, as they are now."""
    from advice import commands, options_of

    return {
        name: {
            "options": sorted(name for name in options_of(command) if name.startswith("-")),
            "arguments": [param.name for param in command.params if param.param_type_name == "argument"],
        }
        for name, command in sorted(commands().items())
    }


def words_of(line: str) -> list[str]:
    """Return a command line's words behind `longext`, without a shell's comment; 1 for each that stands for a value."""
    words = shlex.split(line, comments=True)
    behind = words[next(at for at, word in enumerate(words) if Path(word).name == "longext") + 1 :]
    return ["1" if _PLACEHOLDER.fullmatch(word) else word for word in behind]


def parse(line: str) -> Any:
    """Parse a command line as longext would, running nothing; raises click's UsageError where it cannot."""
    import typer

    from longext.cli import app
    from longext.cli.app import without_dash

    command, words = typer.main.get_command(app), without_dash(words_of(line))
    while isinstance(command, typer.core.TyperGroup):
        command, words = command.get_command(None, words[0]), words[1:]
    return command.make_context(command.name, words)
