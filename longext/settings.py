"""Settings of a command: dataclass fields that are flags, recipe keys and help at once.

A field made by `option` is a flag of its command, with help and bounds; a plain field can be set by recipes and `--set`
alone. Precedence: defaults < recipe (`-c FILE`) < `--set key=value` < flags typed. Unknown keys are errors. No torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from longext.errors import ConfigError, LongextError
from longext.registry import did_you_mean
from longext.untrusted import parse_yaml, read_yaml, shown, type_name

LENGTH = 2**31  # tokens: what a config's max_position_embeddings may be
MANY = 10**6  # counts of things that are done one after the other
_LARGEST = 2**53  # whole numbers without a bound of their own; float64 holds them exactly


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field says of its flag.

    Attributes:
        help: one sentence.
        names: what the value may be, parameters behind a colon left out; listed behind the help, and completed by the
            shell.
        elsewhere: a name that is none of them -> where it belongs, or nothing.
        spellings: of the flag, `--field-name` if empty.
        ge, le: bounds of the value, or of each value of a tuple.
        panel: heading in the help.
        argument: a positional argument, not a flag.
        repeats: a tuple given by repeating the flag, not separated by commas.
        shown: what the help says is the default, if that is not the field's.
        is_flag: False for what only recipes and `--set` give.
    """

    help: str = ""
    names: Callable[[], Iterable[str]] | None = None
    elsewhere: Callable[[str], str] = lambda name: ""
    spellings: tuple[str, ...] = ()
    ge: float | None = None
    le: float | None = None
    panel: str = "Options"
    argument: bool = False
    repeats: bool = False
    shown: str | None = None
    is_flag: bool = True

    @property
    def text(self) -> str:
        """Return the help, with the names that the value may have."""
        if self.names is None:
            return self.help
        listed = ", ".join(self.names())
        return f"{self.help.rstrip('.:')}: {listed}." if self.help else f"{listed}."


def option(default: Any = dataclasses.MISSING, help: str = "", *spellings: str, **more: Any) -> Any:
    """Return a dataclass field that is a flag; `more` are the attributes of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(help=help, spellings=spellings, **more)})


def setting(default: Any = dataclasses.MISSING, help: str = "", **more: Any) -> Any:
    """Return a dataclass field with bounds that recipes and `--set` give, but no flag."""
    return option(default, help, is_flag=False, **more)


def override(kind: type, name: str, default: Any = dataclasses.MISSING, **changes: Any) -> Any:
    """Return the field `name` of `kind` with another default, help or bound, for a class that inherits it."""
    field = next(field for field in dataclasses.fields(kind) if field.name == name)  # type: ignore[arg-type]
    default = field.default if default is dataclasses.MISSING else default
    metadata = {"option": dataclasses.replace(option_of(field), **changes)}
    return dataclasses.field(default=default, metadata=metadata)


def shared_settings(config: Any, kind: type, but: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings that `config` has in common with a class of settings, without those named."""
    names = {field.name for field in dataclasses.fields(kind)} - {*but}
    return {key: value for key, value in vars(config).items() if key in names}


def option_of(field: dataclasses.Field[Any]) -> Option:
    """Return the `Option` of a dataclass field; of a plain field one that is no flag and has no bounds."""
    return field.metadata.get("option") or Option(is_flag=False)


ConfigT = TypeVar("ConfigT")


def build_config(
    kind: type[ConfigT],
    recipe: Path | None,
    settings: Sequence[str],
    typed: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    needed: Sequence[str] = (),
) -> ConfigT:
    """Return a `kind` from a recipe file, `--set key=value` strings and the flags the user typed, in rising priority.

    Args:
        defaults: the command's own defaults, under all of them. `kind.implied_defaults(values)`, if it has that
            method, returns those that depend on what was set.
        needed: settings that the command asks for later, if they are empty: told together with what is missing here.

    Raises:
        ConfigError: unknown key, wrong type, or a required key that nothing gave.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        values.update(_checked(kind, load_recipe(recipe), str(recipe)))
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got '{text}'.")
        parsed = {key.strip(): parse_yaml(value, f"--set {key.strip()}")}
        values.update(_checked(kind, parsed, f"--set {shown(text)}"))
    values.update(_checked(kind, dict(typed), "the command line"))
    implied: dict[str, Any] = getattr(kind, "implied_defaults", lambda values: {})(values)
    values = {**(defaults or {}), **implied, **values}
    _check_bounds(kind, values)
    missing = [field.name for field in _required(kind) if values.get(field.name) is None]
    if missing:
        missing += [name for name in needed if not values.get(name)]
        them = "it" if len(missing) == 1 else "them"
        raise ConfigError(
            f"Missing: {', '.join(missing)}. Give {them} as an argument or flag, or in the recipe (-c FILE)."
        )
    return kind(**values)


def check_names(config: Any) -> None:
    """Raise ConfigError for a setting of `config` that is none of the names its option lists."""
    for field in dataclasses.fields(config):
        own, value = option_of(field), getattr(config, field.name)
        if own.names is None or value is None or value.partition(":")[0] in own.names():
            continue
        raise ConfigError(own.elsewhere(value) or f"Unknown {field.name} '{value}'. {did_you_mean(value, own.names())}")


def find_recipe(name: str) -> Path:
    """Return the recipe file called `name`: a path, or a name inside the shipped recipes (`extend/books-5m-4k-yarn`).

    Raises:
        ConfigError: no such file; names the nearest shipped recipe.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    shipped = shipped_recipes()
    key = name.removesuffix(".yaml").removeprefix("recipes/")
    if key in shipped:
        return shipped[key]
    raise ConfigError(f"No recipe '{name}'. {did_you_mean(key, shipped)}")


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with longext, as name -> file (accelerate's own config files are none)."""
    package = Path(__file__).parent
    root = next((folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()), None)
    if root is None:
        return {}
    found = {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}
    return {name: file for name, file in found.items() if not name.startswith("accelerate/")}


def load_recipe(path: Path) -> dict[str, Any]:
    """Return the mapping in a recipe file (ConfigError where it is missing, broken or not a mapping)."""
    try:
        value = read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"No recipe file {path}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold key: value lines, found {type_name(value)}.")
    return value


def to_recipe(config: Any) -> str:
    """Return `config` as recipe YAML that `build_config` reads back.

    Keys at their default are left out, and so are `force` and `resume`: making something again begins anew, and must
    not replace it unasked.
    """
    fields = [field for field in dataclasses.fields(config) if field.name not in ("force", "resume")]
    defaults = {field.name: field.default for field in fields}
    asked = dataclasses.asdict(config)
    values = {key: asked[key] for key, default in defaults.items() if asked[key] != default}
    if hasattr(config, "implied_defaults"):
        with contextlib.suppress(LongextError):  # a compressor that is gone by now: its numbers are still written
            implied = config.implied_defaults(values)
            values |= {key: asked[key] for key, other in implied.items() if asked[key] != other}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def _required(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]


def _checked(kind: Any, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `values` with each one converted to its field's type; unknown keys and wrong types are errors."""
    hints = typing.get_type_hints(kind)
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'. {did_you_mean(key, known)}")
    # YAML reads a bare `off` as false
    switches = {field.name for field in dataclasses.fields(kind) if field.default == "off"}
    values = {key: "off" if value is False and key in switches else value for key, value in values.items()}
    return {key: _convert(value, known[key], f"{where}: `{key}`") for key, value in values.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    target = next(option for option in options if option is not type(None))
    if typing.get_origin(target) is tuple:
        items = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(_convert(item, typing.get_args(target)[0], where) for item in items)
    if target is bool or isinstance(value, bool):
        if target is bool and isinstance(value, bool):
            return value
        raise ConfigError(f"{where} must be {_spell(target)}, got {shown(value)}.")
    try:
        number = target(value) if target is not int or float(value) == int(float(value)) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or target is str and isinstance(value, (list, dict)):
        raise ConfigError(f"{where} must be {_spell(target)}, got {shown(value)}.")
    if isinstance(number, float) and not math.isfinite(number):
        raise ConfigError(f"{where} must be a finite number, got {number}.")
    if target is str and "\0" in number:
        raise ConfigError(f"{where} must not have a NUL character in it.")
    return number


def _check_bounds(kind: Any, values: Mapping[str, Any]) -> None:
    for field in dataclasses.fields(kind):
        value, bounds = values.get(field.name), option_of(field)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                continue
            if bounds.ge is not None and item < bounds.ge:
                raise ConfigError(f"`{field.name}` must be >= {bounds.ge:g}, got {item}.")
            most = bounds.le if bounds.le is not None else _LARGEST if isinstance(item, int) else math.inf
            if item > most or item < -_LARGEST:
                raise ConfigError(f"`{field.name}` must be <= {most:.17g}, got {shown(item)}.")


def _spell(target: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[target]


def shown_name(path: str) -> str:
    """Return a model or data as titles call it: a path of this machine by its last part, a Hub id as it is."""
    is_path = path.startswith((".", "~")) or Path(path).is_absolute() or Path(path).exists()
    # not resolved: a link is called as the user called it
    return Path(os.path.abspath(Path(path).expanduser())).name if is_path and path else path  # noqa: PTH100
