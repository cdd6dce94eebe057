"""YaRN: by parts with the ramp of its released code, and a temperature on attention."""

from __future__ import annotations

import math
from typing import Any

from longext.rope.formulas import (
    RAMP_FORMULA,
    RAMP_PARAMETERS,
    bake_as_longrope,
    check_ends,
    mscales,
    parameters_of,
    ramp_inv_freq,
)
from longext.rope.spec import ROPE_METHODS, RopeMethod, RopeParameters, RopeSpec


def _temperature(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's sqrt(1/t) = 0.1 m ln s + 1, and 1 for s <= 1 (arXiv 2309.00071, eq. 22; m is DeepSeek's)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(spec: RopeSpec) -> float:
    """Return what multiplies cos and sin: the given factor, DeepSeek's quotient or YaRN's temperature."""
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return _temperature(spec.factor, spec.mscale) / _temperature(spec.factor, spec.mscale_all_dim)
    return _temperature(spec.factor)


def _softmax_scale(spec: RopeSpec) -> float:
    """Return DeepSeek's temperature of mscale_all_dim, squared."""
    return _temperature(spec.factor, spec.mscale_all_dim) ** 2 if spec.mscale_all_dim else 1.0


def _export(spec: RopeSpec) -> RopeParameters:
    if spec.ramp == "paper":
        return {**bake_as_longrope(spec, ramp_inv_freq(spec), _attention_factor(spec)), **mscales(vars(spec))}
    explicit = spec.attention_factor
    return parameters_of(
        spec,
        "yarn",
        factor=float(spec.factor),
        original_max_position_embeddings=spec.original_max_position_embeddings,
        beta_fast=None if spec.beta_fast == 32 else float(spec.beta_fast),
        beta_slow=None if spec.beta_slow == 1 else float(spec.beta_slow),
        truncate=None if spec.truncate else False,
        # transformers reads `attention_factor` as the final value; older engines multiply theirs by `attn_factor`.
        attention_factor=None if explicit is None else float(explicit),
        attn_factor=None if explicit is None else float(explicit) / _temperature(spec.factor),
        **mscales(vars(spec)),
    )


def _read(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    original = parameters.get("original_max_position_embeddings") or max_length
    return {
        "method": "yarn",
        "factor": float(parameters.get("factor") or max_length / original),
        "beta_fast": float(parameters.get("beta_fast") or 32.0),
        "beta_slow": float(parameters.get("beta_slow") or 1.0),
        "truncate": bool(parameters.get("truncate", True)),
        "attention_factor": parameters.get("attention_factor"),
        **mscales(parameters),
    }


ROPE_METHODS.register(
    "yarn",
    RopeMethod(
        title="YaRN",
        reference="arXiv 2309.00071, section 3.4; the ramp of its released code",
        formula=f"{RAMP_FORMULA}, g linear in the dimension index; cos, sin * (0.1 ln s + 1)",
        rope_type="yarn",
        inv_freq=ramp_inv_freq,
        attention_factor=_attention_factor,
        export=_export,
        read={"yarn": _read},
        check=check_ends,
        softmax_scale=_softmax_scale,
        parameters=RAMP_PARAMETERS,
        examples=(
            {},
            {"ramp": "paper"},
            {"truncate": False},
            {"attention_factor": 1.25, "beta_fast": 48.0, "beta_slow": 2.0},
        ),
        colour="#0072b2",
        ramp="code",
    ),
)
