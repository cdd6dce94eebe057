"""The ramp of Llama 3.1."""

from __future__ import annotations

from longext.rope.formulas import RAMP_FORMULA, blend, check_ends, paper_ramp, parameters_of
from longext.rope.spec import ROPE_METHODS, Parameter, RopeMethod, RopeParameters, RopeSpec

_ENDS = ("low_freq_factor", "high_freq_factor")


def _export(spec: RopeSpec) -> RopeParameters:
    return parameters_of(
        spec,
        "llama3",
        factor=float(spec.factor),
        low_freq_factor=float(spec.low_freq_factor),
        high_freq_factor=float(spec.high_freq_factor),
        original_max_position_embeddings=spec.original_max_position_embeddings,
    )


ROPE_METHODS.register(
    "llama3",
    RopeMethod(
        title="Llama 3 frequency ramp",
        reference="Llama 3.1 release (rope_type llama3)",
        formula=f"{RAMP_FORMULA}, g linear in turns from low_freq_factor (0) to high_freq_factor (1)",
        rope_type="llama3",
        inv_freq=lambda spec, _: blend(spec, paper_ramp(spec, spec.low_freq_factor, spec.high_freq_factor)),
        export=_export,
        read={
            "llama3": lambda parameters, _: {
                "method": "llama3",
                **{key: float(parameters[key]) for key in ("factor", *_ENDS)},
            }
        },
        check=lambda spec: check_ends(spec, *_ENDS),
        parameters=(
            Parameter("low_freq_factor", "turns below which a dimension is interpolated (1)"),
            Parameter("high_freq_factor", "turns from which a dimension is kept (4)"),
        ),
        examples=({}, {"low_freq_factor": 2.0, "high_freq_factor": 8.0}),
        colour="#d55e00",
    ),
)
