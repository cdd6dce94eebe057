"""Dynamic NTK: NTK-aware with the factor that the sequence needs."""

from __future__ import annotations

from longext.rope.formulas import base_inv_freq, parameters_of
from longext.rope.methods.ntk import ntk_rope_theta
from longext.rope.spec import ROPE_METHODS, Array, Parameter, RopeMethod, RopeSpec


def _inv_freq(spec: RopeSpec, sequence_length: int | None) -> Array:
    length = spec.original_max_position_embeddings
    stretch = max(sequence_length or length, length) / length
    return base_inv_freq(spec, ntk_rope_theta(spec, spec.alpha * stretch - (spec.alpha - 1)))


ROPE_METHODS.register(
    "dynamic",
    RopeMethod(
        title="dynamic NTK",
        reference="arXiv 2309.00071, section 3.3",
        formula="theta' = theta * (a * l/L - (a - 1))^(d/(d-2)) for l > L tokens of text, a = alpha (the paper: 1)",
        rope_type="dynamic",
        inv_freq=_inv_freq,
        export=lambda spec: parameters_of(spec, "dynamic", factor=float(spec.alpha)),
        read={
            "dynamic": lambda parameters, max_length: {
                "method": "dynamic",
                "alpha": float(parameters["factor"]),
                "original_max_position_embeddings": max_length,
            }
        },
        parameters=(Parameter("alpha", "1 is the paper's form, the factor is the other common one", least=1),),
        examples=({}, {"alpha": 8.0}),
        colour="#56b4e9",
        caveat=(
            "Dynamic NTK changes with the sequence length: `max_position_embeddings` stays at the trained length on "
            "purpose, and keys cached before the length grew keep their old rotation (generate with `use_cache=False`, "
            "or choose a static method)."
        ),
        is_scaling=False,
        follows_length=True,
        keeps_length=True,
        is_exact_inside=True,
    ),
)
