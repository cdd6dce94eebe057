"""From the `rope_parameters` a config carries back to a `RopeSpec`: the inverse of `spec.rope_parameters`."""

from __future__ import annotations

from typing import Any

from longext.errors import CheckpointError
from longext.rope.spec import ROPE_METHODS, RopeParameters, RopeSpec
from longext.untrusted import build

# Names that other projects wrote and transformers 5 does not know (it raises KeyError at model build).
_FOREIGN = {
    "dynamic-yarn": "it has no standard equivalent: load it with its authors' code",
    "ntk-by-parts": "re-export it from the base model with `longext extend --method ntk-by-parts`",
    "axial": "its frequencies belong to image rows and columns, not to text positions",
}


def read_parameters(parameters: RopeParameters, rotary_dim: int, max_position_embeddings: int) -> RopeSpec:
    """Return the RoPE that a flat `rope_parameters` dict describes.

    Args:
        parameters: a flat dict with `rope_type` and `rope_theta` (transformers 5 layout).
        rotary_dim: head_dim x partial_rotary_factor.
        max_position_embeddings: the config's own value; the pre-training length if the type does not record it.

    Raises:
        CheckpointError: a rope type that longext cannot extend.
    """
    rope_type = str(parameters.get("rope_type", parameters.get("type", "default")))
    readers = {kind: read for method in ROPE_METHODS.values() for kind, read in method.read.items()}
    if rope_type not in readers:
        why = _FOREIGN.get(rope_type, f"known types: {', '.join(sorted(readers))}")
        raise CheckpointError(f"The config's rope_type '{rope_type}' cannot be extended: {why}.")
    length = parameters.get("original_max_position_embeddings") or max_position_embeddings
    try:
        common = {
            "rope_theta": float(parameters["rope_theta"]),
            "rotary_dim": rotary_dim,
            "original_max_position_embeddings": int(length),
        }
        return RopeSpec(**{**common, **readers[rope_type](parameters, max_position_embeddings)})
    except KeyError as missing:
        raise CheckpointError(
            f"The config's rope_parameters of type '{rope_type}' lack the key {missing}."
        ) from missing
    except (TypeError, ValueError) as error:  # several bases in a list, as some families have one for each layer
        raise CheckpointError(
            f"The config's rope_parameters of type '{rope_type}' cannot be read ({error}). Restore the model's own."
        ) from error


def spec_from_json(values: Any) -> RopeSpec:
    """Return the RopeSpec that `dataclasses.asdict` and JSON made `values` from (lists become tuples again).

    Raises:
        CheckpointError: an unknown or missing key, a value of another type, or an unknown method.
    """
    where = "The RoPE in run.json"
    spec = build(RopeSpec, values, where, CheckpointError, "Restore the file, or remove it.")
    if spec.method not in ROPE_METHODS or spec.rotary_dim < 2 or spec.original_max_position_embeddings < 1:
        raise CheckpointError(f"{where} is none: method '{spec.method}', {spec.rotary_dim} rotary dimensions.")
    return spec
