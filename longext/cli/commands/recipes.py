"""List, show or copy the shipped recipes.

Example: longext recipes show compare/books-5m-4k
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import typer

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.errors import ConfigError
from longext.settings import find_recipe, option, shipped_recipes


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """`longext recipes`: what is shipped, and a copy of it."""

    action: str = option("list", "list, show or copy.", argument=True)
    name: str | None = option(None, "Name of a recipe, as `list` prints it (show, copy).", argument=True)
    target: str | None = option(None, "File to write (copy; default: the recipe's own name here).", argument=True)


def run(config: RecipesConfig) -> None:
    """Do what `action` says."""
    if config.action not in ("list", "show", "copy"):
        raise ConfigError(f"longext recipes takes list, show or copy, got '{config.action}'.")
    if config.action == "list":
        names = shipped_recipes()
        width = max(map(len, names), default=0)
        for name, file in names.items():
            typer.echo(f"{name:{width}}  {_first_line(file)}")
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


def _first_line(file: Path) -> str:
    """Return what a recipe says it is for."""
    lines = [line.strip("# \n") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next((line for line in lines if line and not line.startswith("longext ")), _command(file.read_text("utf-8")))


def _command(text: str) -> str:
    found = re.match(r"# longext (.+?) -c ", text)
    return found[1] if found else "COMMAND"


COMMANDS.register("recipes", Command(config=RecipesConfig, run=run, has_json=False, has_recipe=False))
