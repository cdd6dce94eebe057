"""Position remapping inside attention: the causal triangle as bands, each with its own query and key positions.

A method (`REMAPS`, one file each in `remaps/`) says which keys each query sees in each band and at which positions the
two are rotated; all bands of a query share one softmax. Nothing of the model's weights or RoPE changes, so that no
checkpoint can hold it. torch is not imported here, so that names and options are listed without it.

Notation: i query number, j key number (both from 0, padding not counted), L trained length, N length asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longext.errors import ConfigError
from longext.registry import Registry
from longext.rope.spec import Parameter

Numbers = Any  # float64 tensor [n] of token numbers: products of whole numbers stay exact
Positions = Any  # positions [n], or [n, pairs] if each dimension pair has its own


@dataclass(frozen=True)
class Band:
    """Keys start(i) .. stop(i) - 1 of query i, seen with the query at position query(i) and key j at key(j).

    Attributes:
        start, stop: numbers of queries -> numbers of keys; clipped to 0 .. i + 1. Neither ever falls.
        query, key: numbers -> positions, whole or not.
    """

    start: Callable[[Numbers], Numbers]
    stop: Callable[[Numbers], Numbers]
    query: Callable[[Numbers], Positions] = lambda i: i
    key: Callable[[Numbers], Positions] = lambda j: j


@dataclass(frozen=True)
class RemapSpec:
    """One remapping: a method, the lengths, and its parameters with every default filled in.

    Attributes:
        method: a name in `REMAPS`.
        trained_length, target_length: L and N.
        num_pairs: dimension pairs that are rotated.
        values: the method's own parameters by name.
        logn: queries beyond L are multiplied by ln(i + 1) / ln L.
        temperature: multiplies queries and keys (YaRN's sqrt(1/t)).
    """

    method: str
    trained_length: int
    target_length: int
    num_pairs: int
    values: Mapping[str, Any] = field(default_factory=dict)
    logn: bool = False
    temperature: float = 1.0

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(name)
        return values[name]

    @property
    def bands(self) -> Sequence[Band]:
        """The bands, which are disjoint."""
        return REMAPS[self.method].bands(self)

    @property
    def exact_length(self) -> int:
        """The longest text that is read exactly as by the plain model."""
        exact = REMAPS[self.method].exact(self) if self.temperature == 1 else 0
        return min(exact, self.trained_length) if self.logn else exact

    @property
    def formula(self) -> str:
        """What becomes of a distance, with the parameters that are used."""
        used = {**self.values, **({"logn": "on"} if self.logn else {}), "temperature": self.temperature}
        return f"{REMAPS[self.method].formula}; here {', '.join(f'{key} {value}' for key, value in used.items())}"

    def describe(self) -> dict[str, Any]:
        """Return what a result says of it."""
        shown = {key: list(value) if isinstance(value, tuple) else value for key, value in self.values.items()}
        lengths = {"trained_length": self.trained_length, "target_length": self.target_length}
        return {"method": self.method, **lengths, **shown, "logn": self.logn, "temperature": self.temperature}


@dataclass(frozen=True, kw_only=True)
class RemapMethod:
    """One method of position remapping.

    Attributes:
        title: how the field calls it.
        reference: the paper or repository that defines it.
        formula: what becomes of a distance d = i - j, in plain text.
        defaults: (L, N, pairs, given parameters) -> all parameters; ours where the source names none.
        bands: spec -> its bands.
        parameters: its own, besides logn and temperature.
        exact: spec -> the longest text in which all distances are as they are.
        colour: of its lines in charts.
        trains: whether training under it is meant: its positions are those that the model was trained on.
    """

    title: str
    reference: str
    formula: str
    defaults: Callable[[int, int, int, Mapping[str, Any]], Mapping[str, Any]]
    bands: Callable[[RemapSpec], Sequence[Band]]
    parameters: tuple[Parameter, ...] = ()
    exact: Callable[[RemapSpec], int] = lambda spec: int(spec.window)
    colour: str = ""
    trains: bool = False


REMAPS: Registry[RemapMethod] = Registry(
    "method",
    package="longext.attention.remaps",
    order=("leaky-rerope", "rerope", "selfextend", "lampe", "dpe", "dca", "string", "window"),
)

SHARED = (
    Parameter("logn", "true multiplies queries beyond the trained length by ln(i + 1) / ln L"),
    Parameter("temperature", "multiplies queries and keys; yarn takes 0.1 ln(N / L) + 1", above=0),
)
_FRACTIONS = ("k", "temperature")  # all other numbers count tokens
WINDOW = Parameter("window", "nearest tokens, whose distances stay as they are", least=1)


def no_checkpoint(method: str) -> str:
    """Return why a checkpoint cannot hold a method, if it is one of these, and what to use instead."""
    name = method.partition(":")[0]
    if name not in REMAPS:
        return ""
    return (
        f"`{name}` remaps positions inside attention, which no checkpoint can hold: use it with --method of eval, "
        f"passkey, compare and generate, or longext.attach(model, '{name}') in Python; for a checkpoint take yarn or "
        "another method of `longext extend --help`."
    )


def is_remap(name: str | None) -> bool:
    """Return True if a method, with or without parameters ("dca:chunk=384"), is a remapping."""
    return name is not None and name.partition(":")[0] in REMAPS


def trainable_remaps() -> list[str]:
    """Return the methods under which a model can be trained."""
    return [name for name in REMAPS if REMAPS[name].trains]


def near_and_far(window: int, query: Callable[[Numbers], Positions], key: Callable[[Numbers], Positions]) -> list[Band]:
    """Return two bands: distances below `window` as they are, all others at the positions given."""
    near = Band(lambda i: i - (window - 1), lambda i: i + 1)
    return [near, Band(lambda i: i * 0, lambda i: i - (window - 1), query, key)]


def group_of(trained: int, target: int, window: int, share: float) -> float:
    """Return the divisor that brings distances of up to `target` tokens to `share` of the trained length, >= 1."""
    return max(1.0, (target - window) / max(1.0, share * trained - window))


def per_pair(
    numbers: Numbers, groups: Sequence[float] | float, num_pairs: int, position: Callable[[Numbers, Numbers], Positions]
) -> Positions:
    """Return position(numbers [n, 1], group size [pairs]), with `groups` spread evenly over the dimension pairs."""
    sizes = groups if isinstance(groups, Sequence) else (groups,)
    each = [sizes[pair * len(sizes) // num_pairs] for pair in range(num_pairs)]
    return position(numbers[:, None], numbers.new_tensor(each))


def remap_spec(
    method: str, trained_length: int, target_length: int | None, num_pairs: int, given: Mapping[str, Any]
) -> RemapSpec:
    """Return the spec of a method with the parameters that were given, checked, and defaults for the others.

    Args:
        target_length: N; None takes 8 L.
        given: parameters by name; text is converted as its form asks.

    Raises:
        ConfigError: unknown method or parameter, or a value out of bounds.
    """
    known = check_parameters(method, given)
    target = target_length or 8 * trained_length
    if target < 2:
        raise ConfigError(f"`target_length` must be >= 2, got {target}.")
    stretch = 0.1 * math.log(max(1.0, target / trained_length)) + 1.0  # YaRN's sqrt(1/t), arXiv 2309.00071, eq. 22
    values = {name: stretch if value == "yarn" else _number(known[name], value) for name, value in given.items()}
    temperature = values.pop("temperature", 1.0)
    logn = bool(values.pop("logn", False))
    settled = {**REMAPS[method].defaults(trained_length, target, num_pairs, values), **values}
    for name, value in settled.items():
        known[name].check(value)
    spec = RemapSpec(method, trained_length, target, num_pairs, settled, logn, temperature)
    if REMAPS[method].exact(spec) < 1:
        used = ", ".join(f"{name} {value}" for name, value in settled.items())
        raise ConfigError(f"`{method}` keeps no distance as it is with {used}: give a smaller window.")
    return spec


def check_parameters(method: str, given: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the parameters that a method takes, by name.

    Raises:
        ConfigError: one is given that it does not take, or cannot have that value.
    """
    known = {parameter.name: parameter for parameter in (*REMAPS[method].parameters, *SHARED)}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"`{method}` takes no `{name}`. It takes {', '.join(known)}, factor and target_length.")
        if name != "temperature" or value != "yarn":
            _number(known[name], value)
    return known


def _number(parameter: Parameter, value: Any) -> Any:
    """Return a parameter's value; text as a number, or as numbers for factors ("2-8-32").

    Raises:
        ConfigError: not a number, or none that this parameter can have.
    """
    if parameter.name == "logn":
        if str(value).lower() not in ("true", "false"):
            raise ConfigError(f"`logn` must be true or false, got '{value}'.")
        return str(value).lower() == "true"
    try:
        listed = value.split("-") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
        numbers: list[Any] = [float(each) for each in listed]
    except (TypeError, ValueError):
        raise ConfigError(f"`{parameter.name}` cannot be '{value}': {parameter.help}.") from None
    if math.inf in numbers:
        raise ConfigError(f"`{parameter.name}` must be a finite number, got '{value}'.")
    numbers = [int(each) if float(each).is_integer() else each for each in numbers]
    for each in numbers:
        parameter.check(each)
    if parameter.name == "factors":
        return tuple(numbers)
    if len(numbers) > 1 or (parameter.name not in _FRACTIONS and not isinstance(numbers[0], int)):
        raise ConfigError(f"`{parameter.name}` must be one whole number, got '{value}'.")
    return numbers[0]
