"""Position interpolation: every frequency divided by the factor."""

from __future__ import annotations

from typing import Any

from longext.rope.formulas import base_inv_freq, parameters_of
from longext.rope.spec import ROPE_METHODS, RopeMethod, RopeParameters


def _read(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    # configs seldom record the pre-training length of this type; those that follow the convention hold L * factor
    factor = float(parameters["factor"])
    length = int(parameters.get("original_max_position_embeddings") or max(1, round(max_length / factor)))
    return {"method": "linear", "factor": factor, "original_max_position_embeddings": length}


def _read_proportional(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    """Gemma 4: `partial_rotary_factor` of a head's pairs have the frequencies of the whole head, the others none."""
    factor = parameters.get("factor") or 1.0
    return {**_read({**parameters, "factor": factor}, max_length), "method": "none" if factor == 1 else "linear"}


ROPE_METHODS.register(
    "linear",
    RopeMethod(
        title="position interpolation (linear)",
        reference="arXiv 2306.15595, section 3.2",
        formula="inv_freq_i = theta^(-2i/d) / s",
        rope_type="linear",
        inv_freq=lambda spec, _: base_inv_freq(spec) / spec.factor,
        export=lambda spec: parameters_of(
            spec, "linear" if spec.num_rotated is None else "proportional", factor=float(spec.factor)
        ),
        read={"linear": _read, "proportional": _read_proportional},
        examples=({},),
        colour="#cc79a7",
        allows_unrotated=True,
    ),
)
