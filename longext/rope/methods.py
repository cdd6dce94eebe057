"""Every RoPE method: the paper's frequencies in float64, and the standard `rope_parameters` that reproduce them.

A method is two functions of one `RopeSpec`:

* `inv_freq(spec, sequence_length) -> (float64 array [rotary_dim / 2], attention_factor)` is the paper;
* `export(spec) -> dict` is what `config.json` carries, always a rope type that plain transformers knows.

The parity test in tests/parity/test_rope_parity.py holds the two together through transformers' own initialisers.
NumPy, not torch: `longext extend` and `longext inspect` then start in a fraction of a second.

Notation: d = rotary_dim, s = factor, L = original_max_position_embeddings, theta = rope_theta; dimension pair i has
inverse frequency theta^(-2i/d), wavelength 2 pi / inv_freq and makes r_i = L / wavelength turns in the trained window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longext.errors import ConfigError
from longext.registry import Registry

Array = NDArray[np.float64]
RopeParameters = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One RoPE: the model's own constants and a method's parameters.

    Attributes:
        method: a name in `ROPE_METHODS`.
        rope_theta: the base theta of pre-training.
        rotary_dim: how many dimensions of a head are rotated (head_dim x partial_rotary_factor).
        original_max_position_embeddings: L, the length the model was pre-trained on.
        factor: s = target length / L, always against the pre-training length.
        beta_fast: dimensions that make at least this many turns in L are left alone (ramp methods).
        beta_slow: dimensions that make at most this many turns in L are fully interpolated (ramp methods).
        ramp: "code" is linear in the dimension index (what YaRN's code and every checkpoint do), "paper" is linear
            in the number of turns (arXiv 2309.00071, eq. 18-19); None takes the method's own default.
        truncate: round the code ramp's ends to whole dimensions (YaRN's code; gpt-oss does not).
        attention_factor: multiplies cos and sin; None takes the method's own rule.
        mscale, mscale_all_dim: yarn only: DeepSeek's pair, two multipliers of 0.1 ln s; cos and sin get the quotient of
            their temperatures, and multi-head latent attention the square of the second one as softmax scale.
        num_rotated: how many dimension pairs have a frequency, if the others have 0 (Gemma 4's proportional RoPE).
        alpha: dynamic NTK only: 1 is the paper's form, s is the other common one.
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only.
        new_rope_theta: abf only: the raised base.
        short_factor: longrope only: per-dimension divisors up to L tokens.
        long_factor: longrope only: per-dimension divisors beyond L tokens.
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
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


@dataclass(frozen=True)
class RopeMethod:
    """One entry of `ROPE_METHODS`.

    Attributes:
        title: how the field calls it.
        reference: the paper or page that defines it.
        formula: the formula in plain text, for cards and tables.
        inv_freq: (spec, sequence_length or None) -> (float64 array [rotary_dim / 2], attention_factor).
        export: spec -> rope_parameters of a standard rope type.
        options: the `RopeSpec` fields a user may set for it, beside `factor`.
        ramp: the ramp it takes where the spec names none ("code" or "paper"); None for methods without that choice.
        keeps_length: True where `max_position_embeddings` must stay L (dynamic NTK).
        is_exact_inside: True where logits up to L tokens equal the base model's.
    """

    title: str
    reference: str
    formula: str
    inv_freq: Callable[[RopeSpec, int | None], tuple[Array, float]]
    export: Callable[[RopeSpec], RopeParameters]
    options: tuple[str, ...] = ()
    ramp: str | None = None
    keeps_length: bool = False
    is_exact_inside: bool = False


ROPE_METHODS: Registry[RopeMethod] = Registry("method")


def default_inv_freq(rope_theta: float, rotary_dim: int) -> Array:
    """Return theta^(-2i/d) for i = 0 .. d/2 - 1 (arXiv 2104.09864, eq. 15), float64 [rotary_dim / 2]."""
    return rope_theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def turns_in_window(inv_freq: Array, window: int) -> Array:
    """Return r_i = window * inv_freq / (2 pi): how many turns each dimension pair makes in `window` positions."""
    return window * inv_freq / (2 * math.pi)


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's sqrt(1/t) = 0.1 m ln s + 1, and 1 for s <= 1 (arXiv 2309.00071, eq. 22; m is DeepSeek's)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_attention_factor(spec: RopeSpec) -> float:
    """Return what multiplies cos and sin under `yarn`: the given factor, DeepSeek's quotient or YaRN's temperature."""
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return yarn_temperature(spec.factor, spec.mscale) / yarn_temperature(spec.factor, spec.mscale_all_dim)
    return yarn_temperature(spec.factor)


def softmax_scale(spec: RopeSpec) -> float:
    """Return what multiplies the softmax scale of multi-head latent attention: DeepSeek's mscale_all_dim, squared."""
    applies = spec.method == "yarn" and spec.mscale_all_dim and not is_identity(spec)
    return yarn_temperature(spec.factor, spec.mscale_all_dim or 1.0) ** 2 if applies else 1.0


def paper_ramp(spec: RopeSpec, inv_freq: Array, low: float, high: float) -> Array:
    """Return gamma in [0, 1], linear in turns: 0 at `low` turns (interpolate), 1 at `high` (leave alone).

    arXiv 2309.00071, eq. 18. float64, the shape of `inv_freq`.
    """
    turns = turns_in_window(inv_freq, spec.original_max_position_embeddings)
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def code_ramp(spec: RopeSpec) -> Array:
    """Return gamma in [0, 1], linear in the dimension index between the dimensions of beta_fast and beta_slow turns.

    This is the ramp of YaRN's released code and of transformers' `yarn` type; it is not the paper's (the frequencies
    differ by up to 4x at s = 32). float64 [rotary_dim / 2].
    """

    def dimension_of(turns: float) -> float:
        length = spec.original_max_position_embeddings
        return spec.rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001
    index = np.arange(spec.rotary_dim // 2, dtype=np.float64)
    return 1.0 - np.clip((index - low) / (high - low), 0.0, 1.0)


def _blend(spec: RopeSpec, gamma: Array) -> Array:
    """Return (1 - gamma) * inv_freq / s + gamma * inv_freq (arXiv 2309.00071, eq. 19)."""
    base = _base(spec)
    return (1.0 - gamma) * base / spec.factor + gamma * base


def _base(spec: RopeSpec, rope_theta: float | None = None) -> Array:
    inv_freq = default_inv_freq(rope_theta or spec.rope_theta, spec.rotary_dim)
    if spec.num_rotated is not None:
        inv_freq[spec.num_rotated :] = 0.0
    return inv_freq


def _default_type(spec: RopeSpec) -> str:
    return "default" if spec.num_rotated is None else "proportional"


def _parameters(spec: RopeSpec, rope_type: str, **keys: Any) -> RopeParameters:
    """Return rope_parameters with the keys in the order a reader expects; None values are left out."""
    theta = keys.pop("rope_theta", spec.rope_theta)
    return {"rope_type": rope_type, "rope_theta": float(theta), **{k: v for k, v in keys.items() if v is not None}}


def bake_as_longrope(spec: RopeSpec, inv_freq: Array, attention_factor: float) -> RopeParameters:
    """Write any static frequencies as `longrope` with equal short and long factors theta_i / inv_freq_i.

    `short_mscale` and `long_mscale` say the temperature a second time for engines that ignore `attention_factor` on
    this type.
    """
    factors = [float(f) for f in _base(spec) / inv_freq]
    return _parameters(
        spec,
        "longrope",
        factor=float(spec.factor),
        original_max_position_embeddings=spec.original_max_position_embeddings,
        short_factor=factors,
        long_factor=factors,
        attention_factor=float(attention_factor),
        short_mscale=float(attention_factor),
        long_mscale=float(attention_factor),
    )


# --- none, linear -----------------------------------------------------------------------------------------------

ROPE_METHODS.register(
    "none",
    RopeMethod(
        title="unchanged RoPE",
        reference="arXiv 2104.09864",
        formula="inv_freq_i = theta^(-2i/d)",
        inv_freq=lambda spec, _: (_base(spec), 1.0),
        export=lambda spec: _parameters(spec, _default_type(spec)),
        is_exact_inside=True,
    ),
)

ROPE_METHODS.register(
    "linear",
    RopeMethod(
        title="position interpolation (linear)",
        reference="arXiv 2306.15595, section 3.2",
        formula="inv_freq_i = theta^(-2i/d) / s",
        inv_freq=lambda spec, _: (_base(spec) / spec.factor, 1.0),
        export=lambda spec: _parameters(
            spec, "linear" if spec.num_rotated is None else "proportional", factor=float(spec.factor)
        ),
    ),
)


# --- base changes: ntk, abf, dynamic ------------------------------------------------------------------------------


def ntk_rope_theta(spec: RopeSpec, factor: float) -> float:
    """Return theta * factor^(d / (d - 2)): the base whose slowest dimension is interpolated by exactly `factor`."""
    pairs = spec.num_rotated or spec.rotary_dim // 2
    exponent: float = spec.rotary_dim / (2 * pairs - 2)
    return float(spec.rope_theta * factor**exponent)


def _ntk_inv_freq(spec: RopeSpec, _: int | None) -> tuple[Array, float]:
    return _base(spec, ntk_rope_theta(spec, spec.factor)), 1.0


ROPE_METHODS.register(
    "ntk",
    RopeMethod(
        title="NTK-aware",
        reference="arXiv 2309.00071, definition 1 (bloc97, 2023)",
        formula="inv_freq_i = theta'^(-2i/d), theta' = theta * s^(d/(d-2))",
        inv_freq=_ntk_inv_freq,
        export=lambda spec: _parameters(spec, _default_type(spec), rope_theta=ntk_rope_theta(spec, spec.factor)),
    ),
)


def _abf_theta(spec: RopeSpec) -> float:
    if spec.new_rope_theta is None:
        raise ConfigError(
            "`abf` needs the raised base: give --rope-theta, for example 500000 (arXiv 2309.16039 raises 10000 to it)."
        )
    if spec.new_rope_theta < spec.rope_theta:
        raise ConfigError(
            f"--rope-theta must not be below the model's own {spec.rope_theta:g}, got {spec.new_rope_theta:g}."
        )
    return spec.new_rope_theta


ROPE_METHODS.register(
    "abf",
    RopeMethod(
        title="adjusted base frequency (raised base)",
        reference="arXiv 2309.16039, section 4.1",
        formula="inv_freq_i = theta'^(-2i/d), theta' given",
        inv_freq=lambda spec, _: (_base(spec, _abf_theta(spec)), 1.0),
        export=lambda spec: _parameters(spec, _default_type(spec), rope_theta=_abf_theta(spec)),
        options=("new_rope_theta",),
    ),
)


def _dynamic_inv_freq(spec: RopeSpec, sequence_length: int | None) -> tuple[Array, float]:
    length = spec.original_max_position_embeddings
    stretch = max(sequence_length or length, length) / length
    return default_inv_freq(ntk_rope_theta(spec, spec.alpha * stretch - (spec.alpha - 1)), spec.rotary_dim), 1.0


ROPE_METHODS.register(
    "dynamic",
    RopeMethod(
        title="dynamic NTK",
        reference="arXiv 2309.00071, section 3.3",
        formula="theta' = theta * (a * l/L - (a - 1))^(d/(d-2)) for l > L tokens of text, a = alpha (the paper: 1)",
        inv_freq=_dynamic_inv_freq,
        export=lambda spec: _parameters(spec, "dynamic", factor=float(spec.alpha)),
        options=("alpha",),
        keeps_length=True,
        is_exact_inside=True,
    ),
)


# --- ramps: ntk-by-parts, yarn, llama3 ----------------------------------------------------------------------------


def _ramp_inv_freq(spec: RopeSpec) -> Array:
    if (spec.ramp or ROPE_METHODS[spec.method].ramp) == "code":
        return _blend(spec, code_ramp(spec))
    return _blend(spec, paper_ramp(spec, _base(spec), spec.beta_slow, spec.beta_fast))


def _by_parts_inv_freq(spec: RopeSpec, _: int | None) -> tuple[Array, float]:
    return _ramp_inv_freq(spec), spec.attention_factor or 1.0


def _by_parts_export(spec: RopeSpec) -> RopeParameters:
    if spec.ramp == "code":
        return _yarn_export(replace(spec, attention_factor=spec.attention_factor or 1.0))
    if spec.attention_factor not in (None, 1.0):
        return bake_as_longrope(spec, *_by_parts_inv_freq(spec, None))
    return _llama3_export(replace(spec, low_freq_factor=spec.beta_slow, high_freq_factor=spec.beta_fast))


def _yarn_inv_freq(spec: RopeSpec, _: int | None) -> tuple[Array, float]:
    return _ramp_inv_freq(spec), yarn_attention_factor(spec)


def _yarn_export(spec: RopeSpec) -> RopeParameters:
    if spec.ramp == "paper":
        return {**bake_as_longrope(spec, *_yarn_inv_freq(spec, None)), **_mscales(spec)}
    given = spec.attention_factor
    return _parameters(
        spec,
        "yarn",
        factor=float(spec.factor),
        original_max_position_embeddings=spec.original_max_position_embeddings,
        beta_fast=None if spec.beta_fast == 32 else float(spec.beta_fast),
        beta_slow=None if spec.beta_slow == 1 else float(spec.beta_slow),
        truncate=None if spec.truncate else False,
        # transformers reads `attention_factor` as the final value; older engines multiply theirs by `attn_factor`.
        attention_factor=None if given is None else float(given),
        attn_factor=None if given is None else float(given) / yarn_temperature(spec.factor),
        **_mscales(spec),
    )


def _mscales(spec: RopeSpec) -> RopeParameters:
    pair = {"mscale": spec.mscale, "mscale_all_dim": spec.mscale_all_dim}
    return {key: value for key, value in pair.items() if value is not None}


def _llama3_inv_freq(spec: RopeSpec, _: int | None) -> tuple[Array, float]:
    return _blend(spec, paper_ramp(spec, _base(spec), spec.low_freq_factor, spec.high_freq_factor)), 1.0


def _llama3_export(spec: RopeSpec) -> RopeParameters:
    return _parameters(
        spec,
        "llama3",
        factor=float(spec.factor),
        low_freq_factor=float(spec.low_freq_factor),
        high_freq_factor=float(spec.high_freq_factor),
        original_max_position_embeddings=spec.original_max_position_embeddings,
    )


_RAMP = "inv_freq_i = (1 - g_i) * theta_i / s + g_i * theta_i"

ROPE_METHODS.register(
    "ntk-by-parts",
    RopeMethod(
        title="NTK-by-parts",
        reference="arXiv 2309.00071, section 3.2",
        formula=f"{_RAMP}, g linear in turns from beta_slow (0) to beta_fast (1)",
        inv_freq=_by_parts_inv_freq,
        export=_by_parts_export,
        options=("beta_fast", "beta_slow", "ramp", "truncate", "attention_factor"),
        ramp="paper",
    ),
)

ROPE_METHODS.register(
    "yarn",
    RopeMethod(
        title="YaRN",
        reference="arXiv 2309.00071, section 3.4; the ramp of its released code",
        formula=f"{_RAMP}, g linear in the dimension index; cos, sin * (0.1 ln s + 1)",
        inv_freq=_yarn_inv_freq,
        export=_yarn_export,
        options=("beta_fast", "beta_slow", "ramp", "truncate", "attention_factor"),
        ramp="code",
    ),
)

ROPE_METHODS.register(
    "llama3",
    RopeMethod(
        title="Llama 3 frequency ramp",
        reference="Llama 3.1 release (rope_type llama3)",
        formula=f"{_RAMP}, g linear in turns from low_freq_factor (0) to high_freq_factor (1)",
        inv_freq=_llama3_inv_freq,
        export=_llama3_export,
        options=("low_freq_factor", "high_freq_factor"),
    ),
)


# --- longrope -----------------------------------------------------------------------------------------------------


def longrope_attention_factor(spec: RopeSpec) -> float:
    """Return the given attention factor, else sqrt(1 + ln s / ln L) (arXiv 2402.13753, Phi-3's rule)."""
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_max_position_embeddings))


def _longrope_factors(spec: RopeSpec) -> tuple[Array, Array]:
    if spec.long_factor is None:
        raise ConfigError("`longrope` needs per-dimension factors: give --factors FILE (JSON with long_factor).")
    short = spec.short_factor if spec.short_factor is not None else (1.0,) * len(spec.long_factor)
    for name, values in (("short_factor", short), ("long_factor", spec.long_factor)):
        if len(values) != spec.rotary_dim // 2:
            raise ConfigError(
                f"`{name}` must have {spec.rotary_dim // 2} numbers (rotary dimensions / 2), got {len(values)}."
            )
    return np.asarray(short, dtype=np.float64), np.asarray(spec.long_factor, dtype=np.float64)


def _longrope_inv_freq(spec: RopeSpec, sequence_length: int | None) -> tuple[Array, float]:
    short, long = _longrope_factors(spec)
    is_long = sequence_length is not None and sequence_length > spec.original_max_position_embeddings
    return _base(spec) / (long if is_long else short), longrope_attention_factor(spec)


def _longrope_export(spec: RopeSpec) -> RopeParameters:
    short, long = _longrope_factors(spec)
    temperature = longrope_attention_factor(spec)
    parameters = bake_as_longrope(spec, _base(spec), temperature)
    return {**parameters, "short_factor": short.tolist(), "long_factor": long.tolist()}


ROPE_METHODS.register(
    "longrope",
    RopeMethod(
        title="LongRoPE",
        reference="arXiv 2402.13753",
        formula="inv_freq_i = theta^(-2i/d) / lambda_i, lambda = short_factor up to L tokens, long_factor beyond",
        inv_freq=_longrope_inv_freq,
        export=_longrope_export,
        options=("short_factor", "long_factor", "attention_factor"),
    ),
)


# --- the two questions everyone asks ------------------------------------------------------------------------------


def compute_inv_freq(spec: RopeSpec, sequence_length: int | None = None) -> tuple[Array, float]:
    """Return what `spec.method` computes: (inverse frequencies, float64 [rotary_dim / 2], attention factor).

    Args:
        sequence_length: tokens in the sequence; only dynamic NTK and LongRoPE look at it.

    Raises:
        ConfigError: an unknown method, or a parameter out of range.
    """
    check_spec(spec)
    method = "none" if is_identity(spec) else spec.method
    return ROPE_METHODS[method].inv_freq(spec, sequence_length)


def rope_parameters(spec: RopeSpec) -> RopeParameters:
    """Return the standard transformers 5 `rope_parameters` dict that reproduces `compute_inv_freq(spec)`.

    Raises:
        ConfigError: an unknown method, or a parameter out of range.
    """
    check_spec(spec)
    method = "none" if is_identity(spec) else spec.method
    return ROPE_METHODS[method].export(spec)


def is_identity(spec: RopeSpec) -> bool:
    """True where a scaling method at factor 1 leaves the RoPE as it is, bit for bit."""
    is_scaling = spec.method in ("none", "linear", "ntk", "ntk-by-parts", "yarn", "llama3")
    return is_scaling and spec.factor == 1 and spec.attention_factor in (None, 1.0)


def check_spec(spec: RopeSpec) -> None:
    """Raise ConfigError for a parameter outside its range, naming the value and the range."""
    ROPE_METHODS[spec.method]
    if not math.isfinite(spec.factor) or spec.factor < 1:
        raise ConfigError(f"`factor` must be a number >= 1 (target length / trained length), got {spec.factor:g}.")
    if not spec.beta_fast > spec.beta_slow > 0:
        raise ConfigError(
            f"`beta_fast` must be above `beta_slow` and both above 0, got {spec.beta_fast:g} and {spec.beta_slow:g}."
        )
    if not spec.high_freq_factor > spec.low_freq_factor > 0:
        raise ConfigError(
            "`high_freq_factor` must be above `low_freq_factor` and both above 0, got "
            f"{spec.high_freq_factor:g} and {spec.low_freq_factor:g}."
        )
    if spec.num_rotated is not None and spec.method not in ("none", "linear", "ntk", "abf"):
        raise ConfigError(
            f"`{spec.method}` cannot be written for proportional RoPE (some dimensions of a head stay unrotated): use "
            "linear, ntk or abf."
        )
    if spec.ramp not in (None, "code", "paper"):
        raise ConfigError(f"`ramp` must be 'code' or 'paper', got '{spec.ramp}'.")
    if spec.attention_factor is not None and not spec.attention_factor > 0:
        raise ConfigError(f"`attention_factor` must be above 0, got {spec.attention_factor:g}.")
    if spec.alpha < 1:
        raise ConfigError(f"`alpha` must be >= 1, got {spec.alpha:g}.")
