"""DroPE: no position embedding at all; the weights have to be trained for it, at the original length."""

from __future__ import annotations

from longext.rope.formulas import ATTENTION_FACTOR, VANISHING, bake_as_longrope, base_inv_freq
from longext.rope.spec import ROPE_METHODS, Array, RopeMethod, RopeSpec


def _inv_freq(spec: RopeSpec, _: int | None = None) -> Array:
    return base_inv_freq(spec) / VANISHING


ROPE_METHODS.register(
    "drope",
    RopeMethod(
        title="DroPE (dropped position embedding)",
        reference="arXiv 2512.12167 (github.com/SakanaAI/DroPE)",
        formula="inv_freq_i = 0",
        rope_type="longrope",
        inv_freq=_inv_freq,
        attention_factor=lambda spec: spec.attention_factor or 1.0,
        export=lambda spec: bake_as_longrope(spec, _inv_freq(spec), spec.attention_factor or 1.0),
        parameters=(ATTENTION_FACTOR,),
        examples=({}, {"attention_factor": 1.2}),
        colour="#117733",
        caveat=(
            "Without position embeddings the base model's weights are of no use: train them for it, at the original "
            "length (`longext finetune -c finetune/books-27m-drope` is an example), before the model reads longer texts."
        ),
        is_scaling=False,
    ),
)
