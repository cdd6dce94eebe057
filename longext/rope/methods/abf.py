"""Adjusted base frequency: a base that you give, for continued pretraining."""

from __future__ import annotations

from longext.errors import ConfigError
from longext.rope.formulas import base_inv_freq, default_type, parameters_of
from longext.rope.spec import ROPE_METHODS, Parameter, RopeMethod, RopeSpec


def _check(spec: RopeSpec) -> None:
    if spec.new_rope_theta is None:
        raise ConfigError(
            "`abf` needs the raised base: give --rope-theta, for example 500000 (arXiv 2309.16039 raises 10000 to it)."
        )
    if spec.new_rope_theta < spec.rope_theta:
        raise ConfigError(
            f"--rope-theta must not be below the model's own {spec.rope_theta:g}, got {spec.new_rope_theta:g}."
        )


ROPE_METHODS.register(
    "abf",
    RopeMethod(
        title="adjusted base frequency (raised base)",
        reference="arXiv 2309.16039, section 4.1",
        formula="inv_freq_i = theta'^(-2i/d), theta' given",
        rope_type="default",
        inv_freq=lambda spec, _: base_inv_freq(spec, spec.new_rope_theta),
        export=lambda spec: parameters_of(spec, default_type(spec), rope_theta=spec.new_rope_theta),
        check=_check,
        parameters=(Parameter("new_rope_theta", "the raised base", flag="rope_theta"),),
        examples=({"new_rope_theta": 5e6},),
        colour="#b2912f",
        is_scaling=False,
        allows_unrotated=True,
    ),
)
