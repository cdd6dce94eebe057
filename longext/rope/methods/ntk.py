"""NTK-aware: a raised base, so that only slow dimensions stretch."""

from __future__ import annotations

from longext.rope.formulas import base_inv_freq, default_type, parameters_of
from longext.rope.spec import ROPE_METHODS, RopeMethod, RopeSpec


def ntk_rope_theta(spec: RopeSpec, factor: float) -> float:
    """Return theta * factor^(d / (d - 2)): the base whose slowest dimension is interpolated by exactly `factor`."""
    pairs = spec.num_rotated or spec.rotary_dim // 2
    exponent: float = spec.rotary_dim / (2 * pairs - 2)
    return float(spec.rope_theta * factor**exponent)


ROPE_METHODS.register(
    "ntk",
    RopeMethod(
        title="NTK-aware",
        reference="arXiv 2309.00071, definition 1 (bloc97, 2023)",
        formula="inv_freq_i = theta'^(-2i/d), theta' = theta * s^(d/(d-2))",
        rope_type="default",
        inv_freq=lambda spec, _: base_inv_freq(spec, ntk_rope_theta(spec, spec.factor)),
        export=lambda spec: parameters_of(spec, default_type(spec), rope_theta=ntk_rope_theta(spec, spec.factor)),
        examples=({},),
        colour="#e69f00",
        allows_unrotated=True,
    ),
)
