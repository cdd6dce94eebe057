"""The mathematics that methods share: plain frequencies, ramps between dimensions, temperatures, `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longext.errors import ConfigError
from longext.rope.spec import ROPE_METHODS, Array, Parameter, RopeParameters, RopeSpec

# A frequency of 0 is written as one 1e15 times as slow: no engine divides by infinity, and over a million positions it
# turns by 1e-9 rad at most, which float32 and float64 of any use cannot tell from 0.
VANISHING = 1e15
RAMP_FORMULA = "inv_freq_i = (1 - g_i) * theta_i / s + g_i * theta_i"
ATTENTION_FACTOR = Parameter(
    "attention_factor", "multiplier of cos and sin (yarn and resonance: 0.1 ln s + 1, else 1)", above=0
)
RAMP_PARAMETERS = (
    Parameter("beta_fast", "turns in L from which a dimension is kept (32)"),
    Parameter("beta_slow", "turns in L below which a dimension is interpolated (1)"),
    # "code" is what YaRN's code and every checkpoint do, "paper" is arXiv 2309.00071, eq. 18-19
    Parameter("ramp", "paper (linear in turns) or code (linear in the index)", choices=("code", "paper")),
    # YaRN's code rounds; gpt-oss does not
    Parameter("truncate", "the code ramp has whole-dimension ends (default) or exact ones"),
    ATTENTION_FACTOR,
)


def _pairs(rotary_dim: int) -> Array:
    """Return i = 0 .. d/2 - 1, float64 [rotary_dim / 2]."""
    import numpy as np  # here, so that methods can be listed without it

    return np.arange(rotary_dim // 2, dtype=np.float64)


def base_inv_freq(spec: RopeSpec, rope_theta: float | None = None) -> Array:
    """Return theta^(-2i/d) for i = 0 .. d/2 - 1 (arXiv 2104.09864, eq. 15), 0 for unrotated pairs; float64 [d / 2].

    Args:
        rope_theta: another base than the model's own.
    """
    inv_freq: Array = (rope_theta or spec.rope_theta) ** -(2 * _pairs(spec.rotary_dim) / spec.rotary_dim)
    if spec.num_rotated is not None:
        inv_freq[spec.num_rotated :] = 0.0
    return inv_freq


def turns_in_window(inv_freq: Array, window: int) -> Array:
    """Return r_i = window * inv_freq / (2 pi): how many turns each dimension pair makes in `window` positions."""
    return window * inv_freq / (2 * math.pi)


def paper_ramp(spec: RopeSpec, low: float, high: float) -> Array:
    """Return gamma in [0, 1], linear in turns: 0 at `low` turns (interpolate), 1 at `high` (leave alone).

    arXiv 2309.00071, eq. 18. float64 [rotary_dim / 2].
    """
    turns = turns_in_window(base_inv_freq(spec), spec.original_max_position_embeddings)
    return ((turns - low) / (high - low)).clip(0.0, 1.0)


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
    # d - 1, though the index ends at d/2 - 1: so do YaRN's code and transformers, whose frequencies these must equal
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # no division by zero; the value of YaRN's code
    return 1.0 - ((_pairs(spec.rotary_dim) - low) / (high - low)).clip(0.0, 1.0)


def ramp_of(spec: RopeSpec) -> str | None:
    """Return the ramp of a spec: its own, else its method's."""
    return spec.ramp or ROPE_METHODS[spec.method].ramp


def ramp_inv_freq(spec: RopeSpec, _: int | None = None) -> Array:
    """Return the frequencies of the ramp that the spec or its method names, between beta_slow and beta_fast turns."""
    return blend(spec, code_ramp(spec) if ramp_of(spec) == "code" else paper_ramp(spec, spec.beta_slow, spec.beta_fast))


def blend(spec: RopeSpec, gamma: Array) -> Array:
    """Return (1 - gamma) * inv_freq / s + gamma * inv_freq (arXiv 2309.00071, eq. 19)."""
    base = base_inv_freq(spec)
    return (1.0 - gamma) * base / spec.factor + gamma * base


def check_ends(spec: RopeSpec, low: str = "beta_slow", high: str = "beta_fast") -> None:
    """Raise ConfigError unless the ramp from `low` to `high` (names of fields) goes up from above 0."""
    lower, upper = getattr(spec, low), getattr(spec, high)
    if not upper > lower > 0:
        raise ConfigError(f"`{high}` must be above `{low}` and both above 0, got {upper:g} and {lower:g}.")


def parameters_of(spec: RopeSpec, rope_type: str, **keys: Any) -> RopeParameters:
    """Return rope_parameters with the keys in the order a reader expects; None values are left out."""
    theta = keys.pop("rope_theta", spec.rope_theta)
    return {"rope_type": rope_type, "rope_theta": float(theta), **{k: v for k, v in keys.items() if v is not None}}


def default_type(spec: RopeSpec) -> str:
    """Return the rope type of a RoPE that nothing scales."""
    return "default" if spec.num_rotated is None else "proportional"


def mscales(values: Mapping[str, Any]) -> RopeParameters:
    """Return DeepSeek's pair, two temperatures that grow with the factor, as far as `values` have it."""
    return {key: float(values[key]) for key in ("mscale", "mscale_all_dim") if values.get(key) is not None}


def stop(spec: RopeSpec, inv_freq: Array, stopped: Array) -> Array:
    """Return `inv_freq` where the pairs that `stopped` (booleans) names turn `VANISHING` times slower than unscaled."""
    import numpy as np

    return np.where(stopped, base_inv_freq(spec) / VANISHING, inv_freq)


def bake_as_longrope(spec: RopeSpec, inv_freq: Array, attention_factor: float) -> RopeParameters:
    """Write any static frequencies as `longrope` with equal short and long factors theta_i / inv_freq_i.

    `short_mscale` and `long_mscale` say the temperature a second time for engines that ignore `attention_factor` on
    this type.
    """
    factors = [float(f) for f in base_inv_freq(spec) / inv_freq]
    return parameters_of(
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
