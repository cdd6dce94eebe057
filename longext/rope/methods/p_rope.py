"""p-RoPE: the slowest pairs do not turn."""

from __future__ import annotations

from longext.errors import ConfigError
from longext.rope.formulas import ATTENTION_FACTOR, bake_as_longrope, base_inv_freq, stop, turns_in_window
from longext.rope.spec import ROPE_METHODS, Array, Parameter, RopeMethod, RopeSpec


def _inv_freq(spec: RopeSpec, _: int | None = None) -> Array:
    import numpy as np

    plain = base_inv_freq(spec)
    if spec.rotary_share is None:  # those that completed a turn in training, so that no phase beyond L is new
        return stop(spec, plain, turns_in_window(plain, spec.original_max_position_embeddings) < 1)
    return stop(spec, plain, np.arange(len(plain)) >= round(spec.rotary_share * len(plain)))


def _check(spec: RopeSpec) -> None:
    if spec.rotary_share is not None and spec.rotary_share > 1:
        raise ConfigError(f"`rotary_share` must be at most 1 (all pairs turn), got {spec.rotary_share:g}.")


ROPE_METHODS.register(
    "p-rope",
    RopeMethod(
        title="p-RoPE (partial rotation)",
        reference="arXiv 2410.06205",
        formula="inv_freq_i = theta^(-2i/d) for the fastest p of the pairs, 0 for the others",
        rope_type="longrope",
        inv_freq=_inv_freq,
        attention_factor=lambda spec: spec.attention_factor or 1.0,
        export=lambda spec: bake_as_longrope(spec, _inv_freq(spec), spec.attention_factor or 1.0),
        check=_check,
        parameters=(
            Parameter("rotary_share", "share of the pairs that turn (those that complete a turn in L)", least=0),
            ATTENTION_FACTOR,
        ),
        examples=({}, {"rotary_share": 0.75}, {"rotary_share": 0.25, "attention_factor": 1.2}),
        colour="#882255",
        is_scaling=False,
    ),
)
