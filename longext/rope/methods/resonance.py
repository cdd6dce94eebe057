"""Resonance RoPE: wavelengths of whole positions, so that every phase beyond L is one that was seen before it."""

from __future__ import annotations

import math
from dataclasses import replace

from longext.rope.formulas import ATTENTION_FACTOR, bake_as_longrope
from longext.rope.spec import ROPE_METHODS, Array, Parameter, RopeMethod, RopeSpec

_WAVES = ("yarn", "ntk", "linear", "none")


def _inv_freq(spec: RopeSpec, _: int | None = None) -> Array:
    under = replace(spec, method=spec.waves)
    wavelengths: Array = 2 * math.pi / ROPE_METHODS[spec.waves].inv_freq(under, None)
    return 2 * math.pi / wavelengths.round()


def _attention_factor(spec: RopeSpec) -> float:
    """Return the given factor, else that of the method whose wavelengths are rounded."""
    return spec.attention_factor or ROPE_METHODS[spec.waves].attention_factor(replace(spec, method=spec.waves))


ROPE_METHODS.register(
    "resonance",
    RopeMethod(
        title="Resonance RoPE",
        reference="arXiv 2403.00071 (github.com/sheryc/resonance_rope)",
        formula="inv_freq_i = 2 pi / round(lambda_i), lambda the wavelengths of yarn (or ntk, linear, none)",
        rope_type="longrope",
        inv_freq=_inv_freq,
        attention_factor=_attention_factor,
        export=lambda spec: bake_as_longrope(spec, _inv_freq(spec), _attention_factor(spec)),
        parameters=(
            Parameter("waves", "whose wavelengths are rounded: yarn (default), ntk, linear or none", choices=_WAVES),
            ATTENTION_FACTOR,
        ),
        examples=({}, {"waves": "none"}, {"waves": "ntk", "attention_factor": 1.1}, {"waves": "linear"}),
        colour="#44aa99",
        is_scaling=False,
    ),
)
