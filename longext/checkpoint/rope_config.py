"""Read the RoPE out of config.json, in either layout, and write a new one in both.

transformers 5 keeps everything in `rope_parameters`; readers built on transformers 4 know `rope_theta` and
`rope_scaling` only and fall back to theta 10000 in silence when they are absent. So both are written, always.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longext.checkpoint.families import UNLISTED, WITHOUT_ROPE, Family, family_of
from longext.checkpoint.source import read_config
from longext.errors import CheckpointError
from longext.models.load import load_config
from longext.rope.methods import RopeParameters, RopeSpec
from longext.rope.reading import read_parameters

FULL_ATTENTION = "full_attention"
_OLD_TYPES = {"su": "longrope"}
_TOP_LEVEL_LENGTH_TYPES = ("llama3", "longrope")


@dataclass(frozen=True, kw_only=True)
class ModelRope:
    """The RoPE of a model as its config has it.

    Attributes:
        model_type: transformers' name of the text model.
        section: the key of the nested text config, or None where the config is flat.
        head_dim: size of an attention head.
        partial_rotary_factor: the fraction of a head that is rotated.
        max_position_embeddings: the length the config claims.
        parameters: flat rope_parameters of the layers that an extension changes.
        local_parameters: rope_parameters of the other layer types (left untouched), by layer type.
        spec: the same RoPE as a `RopeSpec`.
        sliding_window: the window that caps some or all layers' reach, or None.
        layer_types: attention type by layer, or empty.
    """

    model_type: str
    section: str | None
    head_dim: int
    partial_rotary_factor: float
    max_position_embeddings: int
    parameters: RopeParameters
    local_parameters: dict[str, RopeParameters] = field(default_factory=dict)
    spec: RopeSpec
    sliding_window: int | None
    layer_types: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """The spelling rules of this model type."""
        return family_of(self.model_type)

    def describe_layers(self) -> str:
        """Say which layers an extension reaches, and what caps the others."""
        if self.local_parameters:
            reached = sum(kind == FULL_ATTENTION for kind in self.layer_types)
            return f"{reached} of {len(self.layer_types)} layers (full attention); local layers keep their RoPE"
        if self.sliding_window:
            capped = sum(kind != FULL_ATTENTION for kind in self.layer_types) if self.layer_types else "all"
            return f"all layers share one RoPE; {capped} of them see at most {self.sliding_window} tokens"
        return "all layers"


def read_model_rope(directory: Path, trust_remote_code: bool | None = None) -> ModelRope:
    """Read the RoPE of the model in `directory` from its config.json alone.

    Keys that the file leaves to transformers' defaults are looked up there (that imports transformers).

    Raises:
        CheckpointError: no config.json, no RoPE in it, or a RoPE that cannot be extended.
    """
    return model_rope(read_config(directory), directory, trust_remote_code)


def model_rope(config: dict[str, Any], directory: Path, trust_remote_code: bool | None = None) -> ModelRope:
    """Read the RoPE of a parsed config.json; `directory` is where its defaults and its name come from."""
    section = "text_config" if isinstance(config.get("text_config"), dict) else None
    text: dict[str, Any] = dict(config[section]) if section else dict(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    _refuse_without_rope(directory, model_type, text)
    family = family_of(model_type)
    if _needs_defaults(text, family):
        text = _with_defaults(directory, section, trust_remote_code)
    return _model_rope(text, model_type, section, family, directory)


def _refuse_without_rope(directory: Path, model_type: str, text: dict[str, Any]) -> None:
    if model_type in WITHOUT_ROPE:
        raise CheckpointError(
            f"{directory} is a {model_type} model: {WITHOUT_ROPE[model_type]}, no RoPE to extend. "
            "Give a RoPE model (Llama, Mistral, Qwen, Gemma, Phi-3, GPT-NeoX, OLMo, Falcon, ...)."
        )
    if text.get("alibi") is True:
        raise CheckpointError(f"{directory} is a {model_type} model with ALiBi (`alibi: true`), no RoPE to extend.")
    names = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "rope_local_base_freq")
    if not any(name in text for name in names) and model_type not in _ROPE_BY_DEFAULT:
        raise CheckpointError(
            f"No RoPE in {directory / 'config.json'} (model type '{model_type or 'unknown'}'): none of the keys "
            f"{', '.join(names[:3])} is there. longext extends models with rotary position embeddings only."
        )


# Model types whose published configs may leave every RoPE key to the defaults of transformers.
_ROPE_BY_DEFAULT = frozenset(
    {"llama", "falcon", "gpt_neox", "gemma", "gemma2", "gemma3_text", "olmo", "mistral", "phi3"}
)


def _needs_defaults(text: dict[str, Any], family: Family) -> bool:
    """True where the file leaves something to the defaults of transformers, or uses the old per-layer spelling."""
    if family is UNLISTED or (family.alternates and "layer_types" not in text):
        return True
    follows_hidden = not family.omits_head_dim and "hidden_size" in text and "num_attention_heads" in text
    has_head_dim = text.get(family.head_dim_key) or follows_hidden
    parameters = text.get("rope_parameters")
    if family.per_layer_type:
        kinds = {FULL_ATTENTION, *(text.get("layer_types") or ())}
        return not (has_head_dim and isinstance(parameters, dict) and kinds <= {k for k, v in parameters.items() if v})
    theta = text.get(family.theta_key) or (isinstance(parameters, dict) and parameters.get("rope_theta"))
    partial = family.partial_key in text or (isinstance(parameters, dict) and "partial_rotary_factor" in parameters)
    is_complete = has_head_dim and theta and text.get("max_position_embeddings")
    return not is_complete or (family.omits_partial and not partial)


def _with_defaults(directory: Path, section: str | None, trust_remote_code: bool | None) -> dict[str, Any]:
    config = load_config(directory, trust_remote_code)
    text = getattr(config, section) if section else config
    values: dict[str, Any] = text.to_dict()
    values["rope_parameters"] = copy.deepcopy(text.rope_parameters)
    values.pop("rope_scaling", None)
    return values


def _model_rope(
    text: dict[str, Any], model_type: str, section: str | None, family: Family, directory: Path
) -> ModelRope:
    head_dim = text.get(family.head_dim_key) or text["hidden_size"] // text["num_attention_heads"]
    max_length = int(text["max_position_embeddings"])
    parameters, local = _flat_parameters(text, family)
    if parameters.get("rope_theta") is None:
        raise CheckpointError(
            f"{directory / 'config.json'} has no rope_theta. Add the base the model was trained with."
        )
    partial = float(parameters.pop("partial_rotary_factor", None) or text.get(family.partial_key) or 1.0)
    if "original_max_position_embeddings" in text and parameters["rope_type"] in ("llama3", "yarn", "longrope"):
        # transformers gives the top-level key priority (Phi-3's layout)
        parameters["original_max_position_embeddings"] = text["original_max_position_embeddings"]
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    return ModelRope(
        model_type=model_type,
        section=section,
        head_dim=head_dim,
        partial_rotary_factor=partial,
        max_position_embeddings=max_length,
        parameters=parameters,
        local_parameters=local,
        spec=read_parameters(parameters, int(head_dim * partial), max_length),
        sliding_window=window,
        layer_types=tuple(text.get("layer_types") or ()),
    )


def _flat_parameters(text: dict[str, Any], family: Family) -> tuple[RopeParameters, dict[str, RopeParameters]]:
    """Return (parameters of the layers an extension changes, parameters of the others by layer type).

    Follows transformers 5: where a file holds both layouts, `rope_scaling` wins and theta is the top-level key.
    """
    new = text.get("rope_parameters") or {}
    if FULL_ATTENTION in new:
        local = {kind: dict(value) for kind, value in new.items() if kind != FULL_ATTENTION and value}
        return _normal(dict(new[FULL_ATTENTION])), local
    scaling = text.get("rope_scaling")
    chosen = dict(scaling) if scaling else dict(new)
    theta = text.get(family.theta_key)
    if theta is not None:
        chosen.setdefault("rope_theta", theta)
    return _normal(chosen), {}


def _normal(parameters: RopeParameters) -> RopeParameters:
    rope_type = parameters.get("rope_type") or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if rope_type == "yarn" and "long_factor" in parameters:
        rope_type = "longrope"  # an early Phi-3 spelling, which transformers renames too
    return {**parameters, "rope_type": _OLD_TYPES.get(rope_type, rope_type)}


def write_rope(config: dict[str, Any], rope: ModelRope, spec: RopeSpec, parameters: RopeParameters, length: int) -> Any:
    """Return a copy of `config` (the parsed config.json) with a new RoPE in both layouts.

    Args:
        rope: the model's RoPE as read.
        spec: the RoPE to write.
        parameters: its flat `rope_parameters` (`rope_parameters(spec)`).
        length: the new `max_position_embeddings`.
    """
    config = copy.deepcopy(config)
    text = config[rope.section] if rope.section else config
    family = rope.family
    flat = dict(parameters)
    if rope.partial_rotary_factor != 1.0 or family.omits_partial:
        flat["partial_rotary_factor"] = rope.partial_rotary_factor
        text[family.partial_key] = rope.partial_rotary_factor
    is_nested = family.per_layer_type or rope.local_parameters
    text["rope_parameters"] = {**rope.local_parameters, FULL_ATTENTION: flat} if is_nested else flat
    text[family.theta_key] = flat["rope_theta"]
    text["rope_scaling"] = _old_scaling(parameters, family)
    if rope.local_parameters and family.local_theta_key:
        text[family.local_theta_key] = next(iter(rope.local_parameters.values()))["rope_theta"]
    text["max_position_embeddings"] = length
    original = spec.original_max_position_embeddings
    if parameters["rope_type"] in _TOP_LEVEL_LENGTH_TYPES or "original_max_position_embeddings" in text:
        # transformers 4 (longrope) and llama.cpp's converter (llama3) look here, not inside the dict
        text["original_max_position_embeddings"] = original
    elif rope.model_type == "phi3":
        text["original_max_position_embeddings"] = original
    if family.writes_head_dim and text.get(family.head_dim_key) is None:
        # several rope types read `head_dim` from the config without a fallback (Mixtral has null there)
        text[family.head_dim_key] = rope.head_dim
    return config


def _old_scaling(parameters: RopeParameters, family: Family) -> RopeParameters | None:
    if parameters["rope_type"] == "default":
        return None
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_type", "rope_theta")}
    return {family.old_type_key: parameters["rope_type"], **scaling}
