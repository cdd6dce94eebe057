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
from longext.rope.spec import ROPE_METHODS, RopeMethod, RopeParameters, RopeSpec


def _export(spec: RopeSpec) -> RopeParameters:
    if ramp_of(spec) == "code":
        return ROPE_METHODS["yarn"].export(replace(spec, attention_factor=spec.attention_factor or 1.0))
    if spec.attention_factor is not None and spec.attention_factor != 1:
        return bake_as_longrope(spec, ramp_inv_freq(spec), spec.attention_factor)
    return ROPE_METHODS["llama3"].export(replace(spec, low_freq_factor=spec.beta_slow, high_freq_factor=spec.beta_fast))


ROPE_METHODS.register(
    "ntk-by-parts",
    RopeMethod(
        title="NTK-by-parts",
        reference="arXiv 2309.00071, section 3.2",
        formula=f"{RAMP_FORMULA}, g linear in turns from beta_slow (0) to beta_fast (1)",
        rope_type="llama3",
        inv_freq=ramp_inv_freq,
        attention_factor=lambda spec: spec.attention_factor or 1.0,
        export=_export,
        check=check_ends,
        parameters=RAMP_PARAMETERS,
        examples=({}, {"ramp": "code"}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.1}),
        colour="#009e73",
        ramp="paper",
    ),
)
