"""LongRoPE: a divisor for each dimension, from a file."""

from __future__ import annotations

import math
from typing import Any

from longext.errors import CheckpointError, ConfigError
from longext.rope.formulas import ATTENTION_FACTOR, bake_as_longrope, base_inv_freq
from longext.rope.spec import ROPE_METHODS, Array, Parameter, RopeMethod, RopeParameters, RopeSpec


def _attention_factor(spec: RopeSpec) -> float:
    """Return the given attention factor, else sqrt(1 + ln s / ln L) (arXiv 2402.13753, Phi-3's rule)."""
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_max_position_embeddings))


def _factors(spec: RopeSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (short, long) divisors, rotary_dim / 2 of each; short ones are 1 unless they are given."""
    assert spec.long_factor is not None
    short = spec.short_factor if spec.short_factor is not None else (1.0,) * len(spec.long_factor)
    return short, spec.long_factor


def _check(spec: RopeSpec) -> None:
    if spec.long_factor is None:
        raise ConfigError("`longrope` needs per-dimension factors: give --factors FILE (JSON with long_factor).")
    short, long = _factors(spec)
    for name, values in (("long_factor", long), ("short_factor", short)):  # short ones are as many, if none are given
        if len(values) != spec.rotary_dim // 2:
            raise ConfigError(
                f"`{name}` must have {spec.rotary_dim // 2} numbers (rotary dimensions / 2), got {len(values)}."
            )


def _inv_freq(spec: RopeSpec, sequence_length: int | None) -> Array:
    is_long = sequence_length is not None and sequence_length > spec.original_max_position_embeddings
    return base_inv_freq(spec) / _factors(spec)[is_long]


def _export(spec: RopeSpec) -> RopeParameters:
    short, long = _factors(spec)
    parameters = bake_as_longrope(spec, base_inv_freq(spec), _attention_factor(spec))
    return {**parameters, "short_factor": list(map(float, short)), "long_factor": list(map(float, long))}


def _read(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    original = parameters.get("original_max_position_embeddings") or max_length
    return {
        "method": "longrope",
        "factor": float(parameters.get("factor") or max_length / original),
        "short_factor": tuple(parameters["short_factor"]),
        "long_factor": tuple(parameters["long_factor"]),
        "attention_factor": _read_temperature(parameters),
    }


def _read_temperature(parameters: RopeParameters) -> float | None:
    """The factor on cos and sin; Phi-3.5-MoE writes it as two numbers, which its class reads instead."""
    written = (parameters.get("short_mscale"), parameters.get("long_mscale"))
    pair = {float(value) for value in written if value is not None}
    if parameters.get("attention_factor") is not None or not pair:
        return parameters.get("attention_factor")
    if len(pair) > 1:
        raise CheckpointError(
            "The config's rope_parameters have short_mscale and long_mscale of different values "
            f"({parameters['short_mscale']:g} and {parameters['long_mscale']:g}); longext writes one for both."
        )
    return pair.pop()


def _rising(last: float) -> Any:
    """Return the function of rotary_dim that gives rotary_dim / 2 divisors from 1 to `last`, for examples."""
    return lambda rotary_dim: tuple(1 + (last - 1) * i / (rotary_dim // 2 - 1) for i in range(rotary_dim // 2))


_EXAMPLE = {"short_factor": _rising(1.5), "long_factor": _rising(16.0)}
_FILE = "JSON file with long_factor and optional short_factor"

ROPE_METHODS.register(
    "longrope",
    RopeMethod(
        title="LongRoPE",
        reference="arXiv 2402.13753",
        formula="inv_freq_i = theta^(-2i/d) / lambda_i, lambda = short_factor up to L tokens, long_factor beyond",
        rope_type="longrope",
        inv_freq=_inv_freq,
        attention_factor=_attention_factor,
        export=_export,
        read={"longrope": _read, "su": _read},
        check=_check,
        parameters=(
            Parameter("short_factor", _FILE, flag="factors"),
            Parameter("long_factor", _FILE, flag="factors"),
            ATTENTION_FACTOR,
        ),
        examples=(_EXAMPLE, {**_EXAMPLE, "attention_factor": 1.0}, {**_EXAMPLE, "attention_factor": 1.3}),
        colour="#8c564b",
        caveat=(
            "transformers picks the short or long factors per forward pass; vLLM picks once per server from "
            "`--max-model-len`. A cache that crosses the trained length mixes both."
        ),
        is_scaling=False,
        follows_length=True,
    ),
)
