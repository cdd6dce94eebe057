"""Commands from their settings: a dataclass field made by `longext.settings.option` is a flag."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from longext.errors import ConfigError
from longext.extras import require
from longext.settings import Option, build_config, find_recipe, option_of

PANELS = (  # others come before "Output"
    *("Options", "Data", "Method", "Training", "Memory and speed", "Checkpoints", "Processes", "Chat", "Running"),
    "Output",
)
WIDEST = 110  # characters of a line of help, on a terminal that has them
_RECIPE_HEADER = re.compile(r"# longext ([a-z]+(?:[ -][a-z]+)*) -c ")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of the command line.

    Attributes:
        config: the dataclass that holds its settings.
        run: called with the config, and with `as_json` and every switch by name.
        help: what `--help` says above the options; the docstring of the module of `run` by default.
        switches: flags that are no settings: name -> help.
        has_json: it can print its record as JSON.
        has_recipe: it reads recipes and `--set`.
        takes_recipes_of: another command whose recipes it reads.
        defaults: over those of the config.
        only: fields that are flags here; all by default.
        needs: fields without which it does not run, though they have a default.
        extras: extras of longext without which it does not run.
    """

    config: type
    run: Callable[..., None]
    help: str = ""
    switches: Mapping[str, str] = field(default_factory=dict)
    has_json: bool = True
    has_recipe: bool = True
    takes_recipes_of: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()


def build_command(name: str, command: Command) -> TyperCommand:
    """Return the Typer command `name` ("eval ppl") whose flags are the fields of its config."""

    def callback(ctx: typer.Context, **given: Any) -> None:
        require(f"`longext {name}`", command.extras)
        switches = {switch: given[switch] for switch in command.switches}
        if command.has_json:
            switches["as_json"] = given["as_json"]
        command.run(_read_config(ctx, command, given), **switches)

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *_field_parameters(command), *_common_parameters(command)]
    # Typer reads the parameters of a command from its signature
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    text = command.help or inspect.getdoc(sys.modules[command.run.__module__]) or ""
    app.command(name.split()[-1], cls=_Command, help=text, context_settings={"max_content_width": WIDEST})(callback)
    built = typer.main.get_command(app)
    assert isinstance(built, TyperCommand)
    return built


class _Command(TyperCommand):
    """Help in panels, each under its heading."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then the options of each panel."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            is_argument = parameter.param_type_name == "argument"
            panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Output"
            if record is not None:
                panels.setdefault(panel, []).append(record)
        for panel in sorted(panels, key=_panel_place):
            if panels[panel]:
                with formatter.section(panel):
                    formatter.write_dl(panels[panel])


def _panel_place(panel: str) -> float:
    if panel == "Arguments":
        return -1
    return PANELS.index(panel) if panel in PANELS else PANELS.index("Output") - 0.5


def _read_config(ctx: typer.Context, command: Command, given: Mapping[str, Any]) -> Any:
    """Return the config: defaults < recipe < `--set` < flags that were typed."""
    path = find_recipe(given["recipe"]) if given.get("recipe") else None
    if path is not None:
        _check_recipe(path, ctx, command)
    sources = {name: ctx.get_parameter_source(name) for name in given}
    names = {item.name for item in dataclasses.fields(command.config)}
    typed = {
        name: given[name]
        for name, source in sources.items()
        if name in names and source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")
    }
    config: Any = build_config(
        command.config, path, given.get("settings") or [], typed, command.defaults, command.needs
    )
    if not command.takes_recipes_of:
        return config
    # the output that a recipe names is that of the command it is for
    return dataclasses.replace(config, output=typed.get("output"), force=typed.get("force", False))


def _check_recipe(recipe: Path, ctx: typer.Context, command: Command) -> None:
    """Refuse a recipe whose first line says that it is for another command (keys alone do not tell: many are shared).

    Shipped recipes and every output's recipe.yaml begin with `# longext COMMAND -c ...`.
    """
    with recipe.open(encoding="utf-8", errors="replace") as file:
        first = _RECIPE_HEADER.match(file.readline(200))
    name = " ".join(ctx.command_path.split()[1:])  # the first word is the program
    same = {name, name.removeprefix("eval "), f"eval {name}", command.takes_recipes_of}
    if first and first[1] not in same:
        raise ConfigError(
            f"{recipe} is a recipe of `longext {first[1]}`, not of `longext {name}`. Give one of this command's, or "
            "change the recipe's first line."
        )


# --- parameters -------------------------------------------------------------------------------------------------------


def _field_parameters(command: Command) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(command.config)
    fields: list[dataclasses.Field[Any]] = list(dataclasses.fields(command.config))
    if command.only:
        fields = [item for item in fields if item.name in command.only]
    flags = [item for item in fields if option_of(item).is_flag]
    return [
        _parameter(item, hints[item.name], option_of(item), command.defaults.get(item.name, item.default))
        for item in flags
    ]


def _parameter(item: dataclasses.Field[Any], hint: Any, option: Option, default: Any) -> inspect.Parameter:
    """Return the parameter of one field; tuples are text with commas, or a flag that is repeated."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = next(kind for kind in kinds if kind is not type(None))
    is_tuple = typing.get_origin(plain) is tuple
    kind = list[str] if option.repeats else str if is_tuple else plain
    if default is dataclasses.MISSING or (is_tuple and not default):
        default = None
    elif is_tuple:
        default = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
    settings: dict[str, Any] = {
        "help": option.text,
        "show_default": option.shown or default is not None,
        "autocompletion": _completion(option),
    }
    if option.argument:
        info: Any = typer.Argument(**{**settings, "show_default": False})
    else:
        if option.repeats:
            settings["metavar"] = "<str>"
        info = typer.Option(*_spellings(item.name, plain, default, option), rich_help_panel=option.panel, **settings)
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind | None, info]
    )


def _spellings(name: str, kind: Any, default: Any, option: Option) -> tuple[str, ...]:
    """Return the spellings of a flag; what may be on or off has a second one, unless it is off by default."""
    flag = f"--{name.replace('_', '-')}"
    if kind is not bool:
        return option.spellings or (flag,)
    if len(option.spellings) > 1 and all(spelling.startswith("--") for spelling in option.spellings):
        return ("/".join(option.spellings),)
    return option.spellings or ((flag,) if default is False else (f"{flag}/--no-{flag[2:]}",))


def _completion(option: Option) -> Callable[[str], list[str]] | None:
    names = option.names
    if names is None:
        return None
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _common_parameters(command: Command) -> list[inspect.Parameter]:
    flags: dict[str, tuple[Any, Any]] = {
        name: (bool, typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel="Output"))
        for name, text in command.switches.items()
    }
    if command.has_json:
        text = "Print the result as JSON on standard output, and no table; also spelled `--json -`."
        flags["as_json"] = (bool, typer.Option("--json", help=text, rich_help_panel="Output"))
    if command.has_recipe:
        recipe, pair = "Recipe: YAML file or the name of a shipped one.", "key=value, over the recipe; may be repeated."
        flags["recipe"] = (str | None, typer.Option("--config", "-c", help=recipe, rich_help_panel="Output"))
        flags["settings"] = (list[str] | None, typer.Option("--set", help=pair, rich_help_panel="Output"))
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind is bool else None,
            annotation=Annotated[kind, info],
        )
        for name, (kind, info) in flags.items()
    ]
