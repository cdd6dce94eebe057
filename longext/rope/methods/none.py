"""The RoPE of the model as it is."""

from __future__ import annotations

from longext.rope.formulas import base_inv_freq, default_type, mscales, parameters_of
from longext.rope.spec import ROPE_METHODS, RopeMethod

ROPE_METHODS.register(
    "none",
    RopeMethod(
        title="unchanged RoPE",
        reference="arXiv 2104.09864",
        formula="inv_freq_i = theta^(-2i/d)",
        rope_type="default",
        inv_freq=lambda spec, _: base_inv_freq(spec),
        export=lambda spec: parameters_of(spec, default_type(spec)),
        read={"default": lambda parameters, _: {"method": "none", **mscales(parameters)}},
        examples=({},),
        colour="#7a7a7a",
        is_exact_inside=True,
        allows_unrotated=True,
    ),
)
