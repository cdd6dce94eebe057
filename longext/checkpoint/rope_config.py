"""Read the RoPE out of config.json, in either layout, and write a new one in both.

transformers 5 keeps everything in `rope_parameters`; readers built on transformers 4 know `rope_theta` and
`rope_scaling` only and fall back to theta 10000 in silence when they are absent. So both are written, always.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longext.checkpoint.families import UNLISTED, WITHOUT_ROPE, Family, family_of
from longext.checkpoint.load import load_config
from longext.checkpoint.source import read_config
from longext.errors import CheckpointError
from longext.rope.reading import read_parameters
from longext.rope.spec import RopeParameters, RopeSpec, rope_parameters
from longext.untrusted import note

FULL_ATTENTION = "full_attention"
_OLD_TYPES = {"su": "longrope", "mrope": "default"}
_WINDOWED = ("sliding", "chunked", "local")  # parts of the names of layer types with a window
_TOP_LEVEL_LENGTH_TYPES = ("llama3", "longrope")


@dataclass(frozen=True, kw_only=True)
class ModelRope:
    """The RoPE of a model as its config has it.

    Attributes:
        model_type: transformers' name of the text model.
        section: the key of the nested text config (dots between keys), or None if the config is flat.
        head_dim: size of an attention head.
        partial_rotary_factor: the fraction of a head that is rotated.
        max_position_embeddings: the length the config claims (`claimed_length`).
        parameters: flat rope_parameters of the layers that an extension changes.
        local_parameters: rope_parameters of the other layer types (left untouched), by layer type.
        spec: the same RoPE as a `RopeSpec`.
        sliding_window: the window that caps some or all layers' reach, or None.
        layer_types: attention type by layer, or empty.
        kind: the layer type that an extension changes, for models with a RoPE per layer type.
        carried: keys of `parameters` that stay true under any RoPE, and are written again.
        unknown: keys of `parameters` that longext has no meaning for: such a model is not extended.
        layer_theta: the base of each layer (0: no RoPE), or empty.
        length_key: what this model type calls `max_position_embeddings`.
        lacks_head_dim: True if `head_dim` has to be written, because the config holds null there.
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
    kind: str = FULL_ATTENTION
    carried: RopeParameters = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    layer_theta: tuple[float, ...] = ()
    length_key: str = "max_position_embeddings"
    lacks_head_dim: bool = False

    @property
    def family(self) -> Family:
        """The spelling rules of this model type."""
        return family_of(self.model_type)

    @property
    def rope_type(self) -> str:
        """The rope_type that the layers compute; HunYuan writes "dynamic" for a fixed base."""
        kind: str = self.parameters["rope_type"]
        return "default" if self.spec.method == "none" else kind

    def text_of(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a parsed config.json that describes the text model."""
        return text_section(config, self.section)

    def describe_layers(self) -> str:
        """Say which layers an extension reaches, and what caps the others, as far as config.json tells."""
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
    text: dict[str, Any] = dict(text_section(config, section))
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    _refuse_without_rope(directory, model_type, text, is_whole="text_config" not in config)
    if _needs_defaults(text, family_of(model_type)):
        text, section = _with_defaults(config, directory, trust_remote_code)
        model_type = text["model_type"]
    return _model_rope(text, model_type, section, family_of(model_type), directory)


def text_section(config: dict[str, Any], section: str | None) -> dict[str, Any]:
    """Return the dict under the dotted key `section`, or `config` itself for None."""
    for key in section.split(".") if section else ():
        config = config[key]
    return config


def _refuse_without_rope(directory: Path, model_type: str, text: dict[str, Any], is_whole: bool) -> None:
    if model_type in WITHOUT_ROPE:
        raise CheckpointError(
            f"{directory} is a {model_type} model: {WITHOUT_ROPE[model_type]}, no RoPE to extend. "
            "Give a RoPE model (Llama, Mistral, Qwen, Gemma, Phi-3, GPT-NeoX, OLMo, Falcon, ...)."
        )
    if text.get("alibi") is True:
        raise CheckpointError(f"{directory} is a {model_type} model with ALiBi (`alibi: true`), no RoPE to extend.")
    names = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "rope_local_base_freq")
    if is_whole and not any(name in text for name in names) and not family_of(model_type).omits_rope:
        raise CheckpointError(
            f"No RoPE in {directory / 'config.json'} (model type '{model_type or 'unknown'}'): none of the keys "
            f"{', '.join(names[:3])} is there. longext extends models with rotary position embeddings only."
        )


def _needs_defaults(text: dict[str, Any], family: Family) -> bool:
    """True if the file leaves something to the defaults of transformers, or uses the old per-layer spelling."""
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


def _with_defaults(
    raw: dict[str, Any], directory: Path, trust_remote_code: bool | None
) -> tuple[dict[str, Any], str | None]:
    """Return (the text config as transformers fills it in, its dotted key in the file or None)."""
    config = load_config(directory, trust_remote_code)
    try:
        text = config.get_text_config()
    except Exception as error:  # composite configs raise many kinds
        line = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"transformers cannot read {directory / 'config.json'}: {line[:200]}") from error
    values: dict[str, Any] = text.to_dict()
    for key in ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "layer_types"):
        if values.get(key) is None:
            values[key] = getattr(text, key, None)  # a model type may have another name for it
    values["model_type"] = text.model_type
    values["rope_parameters"] = copy.deepcopy(getattr(text, "rope_parameters", None))
    values.pop("rope_scaling", None)
    if not values["rope_parameters"]:
        raise CheckpointError(
            f"{directory} is a {text.model_type} model: its config class has no RoPE parameters, so no RoPE to extend."
        )
    values[_LENGTH_KEY] = type(text).attribute_map.get("max_position_embeddings", "max_position_embeddings")
    values[_LACKS_HEAD_DIM] = "head_dim" in text.to_dict() and text.to_dict()["head_dim"] is None
    kinds = [kind for kind, rope in values["rope_parameters"].items() if isinstance(rope, dict)]
    if kinds and getattr(text, "is_heterogeneous", False):
        with contextlib.suppress(Exception):  # only full-attention layers may have a head size of their own
            values["head_dim"] = text.per_layer_config[_extended_kind(values["rope_parameters"])].head_dim
    return values, _section_of(raw, config, text)


_LENGTH_KEY, _LACKS_HEAD_DIM = "longext_length_key", "longext_lacks_head_dim"


def _section_of(raw: dict[str, Any], config: Any, text: Any, prefix: str = "") -> str | None:
    """The dotted key under which the file has the text config, or None if it is flat."""
    for key, value in raw.items():
        inner = getattr(config, key, None) if isinstance(value, dict) else None
        if inner is None or not hasattr(inner, "to_dict"):
            continue
        if inner is text:
            return f"{prefix}{key}"
        deeper = _section_of(value, inner, text, f"{prefix}{key}.")
        if deeper:
            return deeper
    return None


def _model_rope(
    text: dict[str, Any], model_type: str, section: str | None, family: Family, directory: Path
) -> ModelRope:
    head_dim = text.get(family.head_dim_key) or text["hidden_size"] // text["num_attention_heads"]
    if not text.get("max_position_embeddings"):
        raise CheckpointError(f"{directory / 'config.json'} does not say its length (max_position_embeddings).")
    max_length = claimed_length(text)
    if max_length != text["max_position_embeddings"]:
        note(
            f"{directory / 'config.json'} says max_position_embeddings {text['max_position_embeddings']:,}, and factor "
            f"times as many under another key: read as trained on the former, with a linear RoPE for {max_length:,}."
        )
    parameters, local, kind = _flat_parameters(text, family, directory)
    thetas = tuple(float(theta) for theta in text.get("layer_rope_theta") or ())
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
        spec=_spec(parameters, model_type, head_dim, partial, max_length, thetas),
        sliding_window=window,
        layer_types=tuple(text.get("layer_types") or ()),
        kind=kind,
        carried={key: parameters[key] for key in CARRIED if parameters.get(key) is not None},
        unknown=tuple(sorted(set(parameters) - set(CARRIED) - _KNOWN)),
        layer_theta=thetas,
        length_key=text.get(_LENGTH_KEY, "max_position_embeddings"),
        lacks_head_dim=text.get(_LACKS_HEAD_DIM, family.writes_head_dim and text.get(family.head_dim_key) is None),
    )


# Keys of rope_parameters that say nothing of frequencies: which position axis turns which dimensions, and how queries
# grow with the position. Any RoPE keeps them.
CARRIED = ("mrope_section", "mrope_interleaved", "xdrope_section", "llama_4_scaling_beta")
# Keys that `read_parameters` and the methods' exports account for, and those that no class reads.
_KNOWN = frozenset(
    {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("attention_factor", "attn_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
        *("short_factor", "long_factor", "short_mscale", "long_mscale", "low_freq_factor", "high_freq_factor"),
        *("alpha", "finetuned", "max_position_embeddings"),
    }
)
_ALPHA_TYPES = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "hunyuan_vl_text")


def _spec(
    parameters: RopeParameters, model_type: str, head_dim: int, partial: float, max_length: int, thetas: Any
) -> RopeSpec:
    """The RoPE of flat `rope_parameters` as this model type's class reads them."""
    read = dict(parameters)
    if read["rope_type"] == "dynamic" and read.get("alpha") and model_type in _ALPHA_TYPES:
        # HunYuan: a fixed base theta * alpha^(d/(d-2)) under the name of the method that follows the length
        base = read["rope_theta"] * read["alpha"] ** (head_dim / (head_dim - 2))
        read = {"rope_type": "default", "rope_theta": base}
    if any(thetas):
        read["rope_theta"] = next(theta for theta in thetas if theta)
    if read["rope_type"] == "proportional":
        spec = read_parameters(read, head_dim, max_length)
        return replace(spec, num_rotated=int(partial * head_dim // 2))
    return read_parameters(read, int(head_dim * partial), max_length)


def _extended_kind(parameters: dict[str, Any]) -> str | None:
    """The layer type whose RoPE an extension changes: that of the layers without a window."""
    kinds = [kind for kind, rope in parameters.items() if isinstance(rope, dict)]
    if FULL_ATTENTION in kinds:
        return FULL_ATTENTION
    global_kinds = [kind for kind in kinds if not any(word in kind for word in _WINDOWED)]
    return global_kinds[0] if len(global_kinds) == 1 else None


def _flat_parameters(
    text: dict[str, Any], family: Family, directory: Path
) -> tuple[RopeParameters, dict[str, RopeParameters], str]:
    """Return (parameters of the layers an extension changes, of the others by layer type, the former's type).

    Follows transformers 5: if a file holds both layouts, `rope_scaling` wins and theta is the top-level key.
    """
    new = text.get("rope_parameters") or {}
    nested = {kind: dict(value) for kind, value in new.items() if isinstance(value, dict)}
    if nested:
        kind = _extended_kind(new)
        if kind is None:
            raise CheckpointError(
                f"{directory}: rope_parameters has layer types {', '.join(nested)}; none of them is the one RoPE of "
                "the layers without a window, so there is none to extend."
            )
        return _normal(nested[kind]), {other: rope for other, rope in nested.items() if other != kind}, kind
    scaling = text.get("rope_scaling")
    chosen = dict(scaling) if scaling else dict(new)
    theta = text.get(family.theta_key)
    if theta is not None:
        chosen.setdefault("rope_theta", theta)
    return _normal(chosen), {}, FULL_ATTENTION


def _normal(parameters: RopeParameters) -> RopeParameters:
    rope_type = parameters.get("rope_type") or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if rope_type == "yarn" and "long_factor" in parameters:
        rope_type = "longrope"  # an early Phi-3 spelling, which transformers renames too
    return {**parameters, "rope_type": _OLD_TYPES.get(rope_type, rope_type)}


def write_rope(
    config: dict[str, Any],
    rope: ModelRope,
    spec: RopeSpec,
    parameters: RopeParameters,
    length: int,
    layout: str = "both",
) -> dict[str, Any]:
    """Return a copy of `config` (the parsed config.json) with a new RoPE.

    Args:
        rope: the model's RoPE as read.
        spec: the RoPE to write.
        parameters: its flat `rope_parameters` (`exportable_parameters(rope, spec)`).
        length: the new `max_position_embeddings`.
        layout: "both" spellings, or "new" alone, for classes that read the old one as something else.
    """
    config = copy.deepcopy(config)
    text = rope.text_of(config)
    family = rope.family
    flat = dict(parameters)
    if rope.partial_rotary_factor != 1.0 or family.omits_partial:
        flat["partial_rotary_factor"] = rope.partial_rotary_factor
    is_nested = family.per_layer_type or bool(rope.local_parameters) or rope.kind != FULL_ATTENTION
    text["rope_parameters"] = {**rope.local_parameters, rope.kind: flat} if is_nested else flat
    _write_old_spelling(text, rope, flat, parameters, layout)
    if rope.layer_theta:
        text["layer_rope_theta"] = [_layer_theta(spec, theta) for theta in rope.layer_theta]
    text[rope.length_key] = length
    _raise_other_lengths(config, text, rope, length)
    original = spec.original_max_position_embeddings
    if parameters["rope_type"] in _TOP_LEVEL_LENGTH_TYPES or "original_max_position_embeddings" in text:
        # transformers 4 (longrope) and llama.cpp's converter (llama3) look here, not inside the dict
        text["original_max_position_embeddings"] = original
    elif family.top_level_length:
        text["original_max_position_embeddings"] = original
    if rope.lacks_head_dim:
        # several rope types read `head_dim` from the config without a fallback (Mixtral has null there)
        text[family.head_dim_key] = rope.head_dim
    return config


def _raise_other_lengths(config: dict[str, Any], text: dict[str, Any], rope: ModelRope, length: int) -> None:
    """Raise other keys that state a length, in the text config and beside it: vLLM serves the least of them."""
    for level in (config, text):
        for key in OTHER_LENGTHS:
            value, is_done = level.get(key), level is text and key == rope.length_key
            if is_done or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            is_wish = key == "max_length" and value < rope.max_position_embeddings  # for short answers, no limit
            if value < length and not is_wish:
                level[key] = length


def _write_old_spelling(
    text: dict[str, Any], rope: ModelRope, flat: RopeParameters, parameters: RopeParameters, layout: str
) -> None:
    family = rope.family
    if layout == "new":
        for key in (family.theta_key, family.partial_key, "rope_scaling", family.local_theta_key):
            text.pop(key or "", None)
        return
    if "partial_rotary_factor" in flat:
        text[family.partial_key] = rope.partial_rotary_factor
    text[family.theta_key] = flat["rope_theta"]
    text["rope_scaling"] = _old_scaling(parameters, rope)
    if rope.local_parameters and family.local_theta_key:
        text[family.local_theta_key] = next(iter(rope.local_parameters.values()))["rope_theta"]


def one_spelling(config: dict[str, Any], rope: ModelRope, layout: str) -> dict[str, Any]:
    """Return a copy of `config` with one spelling of the RoPE left: "new" or "old"."""
    config = copy.deepcopy(config)
    text = rope.text_of(config)
    for key in OLD_KEYS if layout == "new" else NEW_KEYS:
        text.pop(key, None)
    return config


# What besides `length_key` may state how many tokens a model reads, or generates up to (`max_length`).
OTHER_LENGTHS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("seq_len", "seq_length", "model_max_length", "tokenizer_model_max_length", "max_length"),
)


def claimed_length(text: Mapping[str, Any]) -> int:
    """Return how many tokens a text config says that its model reads: max_position_embeddings, in nearly all of them.

    A linear RoPE that does not record its pre-training length was written both ways. If another key (OTHER_LENGTHS)
    says factor x max_position_embeddings, that is what is read, and max_position_embeddings the pre-training length
    (Vicuna 1.5 16k).
    """
    length, rope = int(text["max_position_embeddings"]), text.get("rope_scaling") or text.get("rope_parameters") or {}
    if (rope.get("rope_type") or rope.get("type")) != "linear" or rope.get("original_max_position_embeddings"):
        return length
    whole = round(length * rope["factor"])
    return whole if any(text.get(key) == whole for key in OTHER_LENGTHS) else length


def length_of(config: Any) -> int:
    """Return `claimed_length` of a text config as transformers holds it."""
    return claimed_length({**config.to_dict(), "max_position_embeddings": config.max_position_embeddings})


# What to delete from config.json to leave one spelling of the RoPE.
OLD_KEYS = (
    *("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "rope_local_base_freq"),
)
NEW_KEYS = ("rope_parameters",)


def _layer_theta(spec: RopeSpec, theta: float) -> float:
    """The written base of one layer; 0 (no RoPE) stays."""
    return float(rope_parameters(replace(spec, rope_theta=theta))["rope_theta"]) if theta else 0


def _old_scaling(parameters: RopeParameters, rope: ModelRope) -> RopeParameters | None:
    carried = rope.carried.keys() & parameters.keys()
    if parameters["rope_type"] == "default" and not carried:
        return None
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_type", "rope_theta")}
    return {rope.family.old_type_key: parameters["rope_type"], **scaling}
