"""A RoPE as data (`RopeSpec`), what a method says of itself (`RopeMethod`), and the methods by name (`ROPE_METHODS`).

Each file of `longext/rope/methods` is one method: functions of one `RopeSpec`, of which `inv_freq` is the paper in
float64 and `export` what `config.json` carries, always a rope type that plain transformers knows.

tests/parity/test_rope_parity.py holds the two together through transformers' own initialisers. NumPy is imported by the
first array, not by these modules: the help of `longext extend` lists the methods and what they take.

Notation: d = rotary_dim, s = factor, L = original_max_position_embeddings, theta = rope_theta; dimension pair i has
inverse frequency theta^(-2i/d), wavelength 2 pi / inv_freq and makes r_i = L / wavelength turns in the trained window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from longext.errors import ConfigError
from longext.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"
RopeParameters = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One RoPE: the model's own constants and a method's parameters (what those mean: `RopeMethod.parameters`).

    Attributes:
        method: a name in `ROPE_METHODS`.
        rope_theta: the base theta of pre-training.
        rotary_dim: how many dimensions of a head are rotated (head_dim x partial_rotary_factor).
        original_max_position_embeddings: L, the length the model was pre-trained on.
        factor: s = target length / L, always against the pre-training length.
        ramp: None takes the method's own default, and so does attention_factor.
        mscale, mscale_all_dim: yarn only: DeepSeek's pair, two multipliers of 0.1 ln s; cos and sin get the quotient of
            their temperatures, and multi-head latent attention the square of the second one as softmax scale.
        num_clipped, rotary_share: None takes the method's own default, from the lengths.
        num_rotated: how many dimension pairs have a frequency, if the others have 0 (Gemma 4's proportional RoPE).
    """

    method: str
    rope_theta: float
    rotary_dim: int
    original_max_position_embeddings: int
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ramp: str | None = None
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    num_rotated: int | None = None
    alpha: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    new_rope_theta: float | None = None
    num_clipped: int | None = None
    clip: str = "cosine"
    waves: str = "yarn"
    rotary_share: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Parameter:
    """An option of a method besides the factor.

    Attributes:
        name: the field of `RopeSpec`, which has the default.
        help: what it means, with the default.
        flag: what recipes and flags call it, if not by its name.
        above, least: the value must be above, or at least, this.
        choices: what a text may be.
    """

    name: str
    help: str
    flag: str | None = None
    above: float = -math.inf
    least: float = -math.inf
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What recipes and flags call it."""
        return self.flag or self.name

    def check(self, value: Any) -> None:
        """Raise ConfigError for a value out of bounds; None means the default."""
        if self.choices and value not in (None, *self.choices):
            raise ConfigError(f"`{self.name}` must be {' or '.join(map(repr, self.choices))}, got '{value}'.")
        if isinstance(value, (int, float)) and not (value > self.above and value >= self.least):
            bound = f"above {self.above:g}" if self.above > self.least else f">= {self.least:g}"
            raise ConfigError(f"`{self.name}` must be {bound}, got {value:g}.")


@dataclass(frozen=True, kw_only=True)
class RopeMethod:
    """One method; the defaults are those of one that scales every sequence alike.

    Attributes:
        title: how the field calls it.
        reference: the paper or page that defines it.
        formula: in plain text, for cards and tables.
        rope_type: the type of transformers that it is written as, unless its parameters ask for another.
        inv_freq: (spec, sequence_length or None) -> float64 array [rotary_dim / 2].
        export: spec -> rope_parameters of a standard rope type.
        attention_factor: spec -> what multiplies cos and sin.
        softmax_scale: spec -> what multiplies the softmax scale of multi-head latent attention.
        parameters: options besides the factor.
        check: raises ConfigError for parameters that do not go together.
        read: rope type -> the reader of it: (rope_parameters, max_position_embeddings) -> fields of a `RopeSpec`.
        examples: `RopeSpec` fields that tests hold to transformers, the plainest first; a function gets rotary_dim.
        colour: of its lines in charts, the same in all; empty for a spare one.
        caveat: what a user of the extended checkpoint has to know, for its card.
        ramp: the ramp it takes if the spec names none ("code" or "paper"); None for methods without that choice.
        is_scaling: all it does grows with the factor, so that factor 1 is `none`, bit for bit.
        follows_length: frequencies depend on the number of tokens in the sequence.
        keeps_length: `max_position_embeddings` must stay L (dynamic NTK).
        is_exact_inside: logits up to L tokens equal the base model's.
        allows_unrotated: it can be written for proportional RoPE.
    """

    title: str
    reference: str
    formula: str
    rope_type: str
    inv_freq: Callable[[RopeSpec, int | None], Array]
    export: Callable[[RopeSpec], RopeParameters]
    attention_factor: Callable[[RopeSpec], float] = lambda spec: 1.0
    softmax_scale: Callable[[RopeSpec], float] = lambda spec: 1.0
    parameters: tuple[Parameter, ...] = ()
    check: Callable[[RopeSpec], None] = lambda spec: None
    read: Mapping[str, Callable[[RopeParameters, int], dict[str, Any]]] = field(default_factory=dict)
    examples: tuple[Mapping[str, Any], ...] = ()
    colour: str = ""
    caveat: str = ""
    ramp: str | None = None
    is_scaling: bool = True
    follows_length: bool = False
    keeps_length: bool = False
    is_exact_inside: bool = False
    allows_unrotated: bool = False


ROPE_METHODS: Registry[RopeMethod] = Registry("method", package="longext.rope.methods")


def extension_methods() -> list[str]:
    """Return the names of all methods but `none`; imports none of them."""
    return [name for name in ROPE_METHODS if name != "none"]


def methods_that(fits: Callable[[RopeMethod], bool]) -> str:
    """Return the names of the extension methods that fit, for messages."""
    return ", ".join(name for name in extension_methods() if fits(ROPE_METHODS[name]))


def parameter_help(flag: str) -> str:
    """Return a line on a parameter: which methods take it, and what it means."""
    takers = {name: each for name in ROPE_METHODS for each in ROPE_METHODS[name].parameters if each.key == flag}
    return f"{', '.join(takers)}: {next(iter(takers.values())).help}."


def compute_inv_freq(spec: RopeSpec, sequence_length: int | None = None) -> tuple[Array, float]:
    """Return what `spec.method` computes: (inverse frequencies, float64 [rotary_dim / 2], attention factor).

    Args:
        sequence_length: tokens in the sequence, for methods that follow it.

    Raises:
        ConfigError: an unknown method, or a parameter out of range.
    """
    method = _method_of(spec)
    return method.inv_freq(spec, sequence_length), method.attention_factor(spec)


def rope_parameters(spec: RopeSpec) -> RopeParameters:
    """Return the standard transformers 5 `rope_parameters` dict that reproduces `compute_inv_freq(spec)`.

    Raises:
        ConfigError: an unknown method, or a parameter out of range.
    """
    return _method_of(spec).export(spec)


def softmax_scale(spec: RopeSpec) -> float:
    """Return what multiplies the softmax scale of multi-head latent attention under `spec`."""
    return _method_of(spec).softmax_scale(spec)


def _method_of(spec: RopeSpec) -> RopeMethod:
    check_spec(spec)
    method = ROPE_METHODS[spec.method]
    is_identity = method.is_scaling and spec.factor == 1 and spec.attention_factor in (None, 1.0)
    return ROPE_METHODS["none"] if is_identity else method


def check_spec(spec: RopeSpec) -> None:
    """Raise ConfigError for a parameter outside its range, naming the value and the range."""
    method = ROPE_METHODS[spec.method]
    if not math.isfinite(spec.factor) or spec.factor < 1:
        raise ConfigError(f"`factor` must be a number >= 1 (target length / trained length), got {spec.factor:g}.")
    if spec.num_rotated is not None and not method.allows_unrotated:
        raise ConfigError(
            f"`{spec.method}` cannot be written for proportional RoPE (some dimensions of a head stay unrotated): "
            f"choose one of {methods_that(lambda other: other.allows_unrotated)}."
        )
    for parameter in method.parameters:
        parameter.check(getattr(spec, parameter.name, None))
    method.check(spec)
