"""From the `rope_parameters` a config carries back to a `RopeSpec`: the inverse of `methods.rope_parameters`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longext.errors import CheckpointError
from longext.rope.methods import ROPE_METHODS, RopeParameters, RopeSpec
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
        max_position_embeddings: the config's own value; the pre-training length where the type does not record it.

    Raises:
        CheckpointError: a rope type that longext cannot extend.
    """
    rope_type = str(parameters.get("rope_type", parameters.get("type", "default")))
    if rope_type not in _READERS:
        why = _FOREIGN.get(rope_type, f"known types: {', '.join(sorted(_READERS))}")
        raise CheckpointError(f"The config's rope_type '{rope_type}' cannot be extended: {why}.")
    length = parameters.get("original_max_position_embeddings") or max_position_embeddings
    try:
        common = {
            "rope_theta": float(parameters["rope_theta"]),
            "rotary_dim": rotary_dim,
            "original_max_position_embeddings": int(length),
        }
        return RopeSpec(**{**common, **_READERS[rope_type](parameters, max_position_embeddings)})
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


def _linear(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    # `linear` does not record the pre-training length; configs that follow the convention hold L * factor.
    factor = float(parameters["factor"])
    return {
        "method": "linear",
        "factor": factor,
        "original_max_position_embeddings": max(1, round(max_length / factor)),
    }


def _yarn(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    original = parameters.get("original_max_position_embeddings") or max_length
    factor = float(parameters.get("factor") or max_length / original)
    return {
        "method": "yarn",
        "factor": factor,
        "beta_fast": float(parameters.get("beta_fast") or 32.0),
        "beta_slow": float(parameters.get("beta_slow") or 1.0),
        "truncate": bool(parameters.get("truncate", True)),
        "attention_factor": parameters.get("attention_factor"),
        **_mscales(parameters),
    }


def _mscales(parameters: RopeParameters) -> dict[str, Any]:
    """DeepSeek's pair, which grows with the factor."""
    return {key: float(parameters[key]) for key in ("mscale", "mscale_all_dim") if parameters.get(key) is not None}


def _dynamic(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    return {
        "method": "dynamic",
        "alpha": float(parameters["factor"]),
        "original_max_position_embeddings": max_length,
    }


def _proportional(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    """Gemma 4: `partial_rotary_factor` of a head's pairs have the frequencies of the whole head, the others none."""
    factor = float(parameters.get("factor") or 1.0)
    return {
        "method": "none" if factor == 1 else "linear",
        "factor": factor,
        "original_max_position_embeddings": max(1, round(max_length / factor)),
    }


def _longrope(parameters: RopeParameters, max_length: int) -> dict[str, Any]:
    original = parameters.get("original_max_position_embeddings") or max_length
    return {
        "method": "longrope",
        "factor": float(parameters.get("factor") or max_length / original),
        "short_factor": tuple(parameters["short_factor"]),
        "long_factor": tuple(parameters["long_factor"]),
        "attention_factor": _longrope_temperature(parameters),
    }


def _longrope_temperature(parameters: RopeParameters) -> float | None:
    """The factor on cos and sin; Phi-3.5-MoE writes it as two numbers, which its class reads instead."""
    written = (parameters.get("short_mscale"), parameters.get("long_mscale"))
    pair = {float(value) for value in written if value is not None}
    if parameters.get("attention_factor") is not None or not pair:
        return parameters.get("attention_factor")
    if len(pair) > 1:
        raise CheckpointError(
            "The config's rope_parameters have short_mscale and long_mscale of different values "
            f"({parameters['short_mscale']:g} and {parameters['long_mscale']:g}); longext writes one for both."
        )
    return pair.pop()


def _llama3(parameters: RopeParameters, _: int) -> dict[str, Any]:
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    return {"method": "llama3", **{key: float(parameters[key]) for key in keys}}


_READERS: dict[str, Callable[[RopeParameters, int], dict[str, Any]]] = {
    "default": lambda parameters, _: {"method": "none", **_mscales(parameters)},
    "linear": _linear,
    "dynamic": _dynamic,
    "proportional": _proportional,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
    "llama3": _llama3,
}
