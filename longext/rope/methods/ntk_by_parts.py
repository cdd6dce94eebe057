"""NTK-by-parts: fast dimensions kept, slow ones interpolated, a ramp in turns between."""

from __future__ import annotations

from dataclasses import replace

from longext.rope.formulas import (
    RAMP_FORMULA,
    RAMP_PARAMETERS,
    bake_as_longrope,
    check_ends,
    ramp_inv_freq,
    ramp_of,
)
from longext.rope.spec import ROPE_METHODS, Array, RopeMethod, RopeParameters, RopeSpec


def _inv_freq(spec: RopeSpec, _: int | None) -> tuple[Array, float]:
    return ramp_inv_freq(spec), spec.attention_factor or 1.0


def _export(spec: RopeSpec) -> RopeParameters:
    if ramp_of(spec) == "code":
        return ROPE_METHODS["yarn"].export(replace(spec, attention_factor=spec.attention_factor or 1.0))
    if spec.attention_factor not in (None, 1.0):
        return bake_as_longrope(spec, *_inv_freq(spec, None))
    return ROPE_METHODS["llama3"].export(replace(spec, low_freq_factor=spec.beta_slow, high_freq_factor=spec.beta_fast))


ROPE_METHODS.register(
    "ntk-by-parts",
    RopeMethod(
        title="NTK-by-parts",
        reference="arXiv 2309.00071, section 3.2",
        formula=f"{RAMP_FORMULA}, g linear in turns from beta_slow (0) to beta_fast (1)",
        rope_type="llama3",
        inv_freq=_inv_freq,
        export=_export,
        check=lambda spec: check_ends(spec, "beta_slow", "beta_fast"),
        parameters=RAMP_PARAMETERS,
        examples=({}, {"ramp": "code"}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.1}),
        colour="#009e73",
        ramp="paper",
    ),
)
