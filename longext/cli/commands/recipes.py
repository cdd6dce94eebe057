"""List, show or copy the shipped recipes.

Example: longext recipes show compare/books-5m-4k
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import typer

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.errors import ConfigError
from longext.settings import find_recipe, option, shipped_recipes

_USE = "longext COMMAND -c NAME uses one as it is; longext recipes copy NAME writes a copy to change."


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """`longext recipes`: what is shipped, and a copy of it."""

    action: str = option("list", "list, show or copy.", argument=True)
    name: str | None = option(None, "Name of a recipe, as `list` prints it (show, copy).", argument=True)
    target: str | None = option(None, "File to write (copy; default: the recipe's own name here).", argument=True)


def run(config: RecipesConfig) -> None:
    """Do what `action` says."""
    from longext.report.console import print_table
    from longext.report.tables import Table

    if config.action not in ("list", "show", "copy"):
        raise ConfigError(f"longext recipes takes list, show or copy, got '{config.action}'.")
    if config.action == "list":
        rows = [[name, _first_sentence(file)] for name, file in shipped_recipes().items()]
        print_table(Table("recipes", ["name", "for"], rows, left=frozenset({1}), caption=_USE))
        return
    if config.name is None:
        raise ConfigError(f"longext recipes {config.action} needs the name of a recipe: longext recipes list.")
    file = find_recipe(config.name)
    text = file.read_text(encoding="utf-8")
    if config.action == "show":
        typer.echo(text, nl=False)
        return
    _copy(text, Path(config.target or file.name))


def _copy(text: str, target: Path) -> None:
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{target} exists already. Name another file: longext recipes copy NAME FILE.") from error
    typer.echo(f"Wrote {target}. Use it: longext {_command(text)} -c {target}")


def _first_sentence(file: Path) -> str:
    """Return what a recipe says it is for: the first sentence of its comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines[1:])
    text = " ".join(line.strip("# ") for line in comment)
    return re.split(r"(?<=[.?!])\s+(?=[A-Z])", text)[0].rstrip(".")


def _command(text: str) -> str:
    found = re.match(r"# longext (.+?) -c ", text)
    return found[1] if found else "COMMAND"


COMMANDS.register("recipes", Command(config=RecipesConfig, run=run, has_json=False, has_recipe=False))
