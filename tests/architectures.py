"""Tiny random models of as many architectures of transformers as a few rules about the names of sizes can make.

Unlike families.py, which spells out the families with a row of their own, these come from transformers' mappings: each
config class gets those of the sizes below that it has, and what its validation asks for besides.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LENGTH = 64  # max_position_embeddings
THETA = 20_000.0
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    "zero_expert_num": 2,
}
_STATE_SPACE = {
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "mamba_head_dim", "ssm_state_size", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "num_mem_blocks"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **{"mamba_d_ssm": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "conv_L_cache": 3},
}
_SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "kv_channels": 16, "qk_head_dim": 32},
    **{"max_position_embeddings": LENGTH, "sliding_window": 16, "attention_chunk_size": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3},
    **{"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "vocab_size_per_layer_input": 128},
    **{"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "global_head_dim": 32, "laurel_rank": 8},
    **{"intermediate_size_mlp": 96, "ffn_hidden_size": 96, "block_dim": 64},
    **_LATENT,
    **_EXPERTS,
    **_STATE_SPACE,
}
_VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_heads": 2},
    **{"depth": 1, "embed_dim": 32, "image_size": 8, "patch_size": 4, "spatial_merge_size": 1, "head_dim": 16},
    **{"temporal_patch_size": 1, "out_hidden_size": 64, "num_position_embeddings": 4},
    **{"deepstack_visual_indexes": [0], "fullatt_block_indexes": [0], "num_channels": 3},
}
PLAIN = {"rope_type": "default", "rope_theta": THETA}
_HALF = ["sliding_attention", "full_attention"]
_BETA = {**PLAIN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": LENGTH}
_NESTED = {"sliding_attention": {**PLAIN, "rope_theta": 10_000.0}, "full_attention": dict(PLAIN)}

# What the rules above do not reach.
_MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("apertus", "cwm", "gpt_oss"), {"rope_parameters": PLAIN}),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": _NESTED},
    "beam": {"rope_parameters": {"sliding_attention": PLAIN, "full_attention": None}},
    "gemma3_text": {"rope_parameters": _NESTED},
    "glm4v_text": {"rope_parameters": {**PLAIN, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm4v_moe_text": {"rope_parameters": {**PLAIN, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
    "granite_swa": {"layer_rope_theta": [10_000.0, THETA]},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1e3, "factor": 1.0}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 24},
    "ministral3": {"rope_parameters": _BETA},
    "mistral4": {"rope_parameters": _BETA, "head_dim": None},
    **dict.fromkeys(
        ("glm_ocr_text", "qwen2_5_omni_text", "paddleocr_vl_text"),
        {"rope_parameters": {**PLAIN, "mrope_section": [4, 2, 2]}},
    ),
    "phi3": {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"),
        {"rope_parameters": {**PLAIN, "mrope_section": [4, 2, 2]}},
    ),
    "smollm3": {"no_rope_layer_interval": 2},
    "zamba2": {
        **{"num_key_value_heads": 4, "attention_head_dim": 32, "use_mem_rope": True, "hybrid_layer_ids": [1]},
        **{"layers_block_type": ["mamba", "hybrid"]},
    },
    "zaya": {"num_experts_per_tok": 1},
}


def _fields(cls: Any) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(inspect.signature(cls.__init__).parameters)


def _made(cls: Any, sizes: dict[str, Any], more: dict[str, Any]) -> PretrainedConfig:
    known = _fields(cls)
    config: PretrainedConfig = cls(**copy.deepcopy({**{k: v for k, v in sizes.items() if k in known}, **more}))
    return config


@functools.cache
def _text_keys(model_type: str) -> dict[str, Any]:
    """Sizes, and layer types that alternate wherever the family has more than one."""
    cls = CONFIG_MAPPING[model_type]
    more = dict(_MORE.get(model_type, {}))
    if "kv_lora_rank" in _fields(cls):
        more.setdefault("num_key_value_heads", _SIZES["num_attention_heads"])
    if "layer_types" in _fields(cls) and "layer_types" not in more:
        kinds = set(_made(cls, {**_SIZES, "num_hidden_layers": 8, "num_layers": 8}, more).layer_types or ())
        other = next((kind for kind in ("sliding_attention", "linear_attention") if kind in kinds), None)
        if other:
            more["layer_types"] = [other, "full_attention"]
    return more


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a tiny config of a text model, or of an image-text model with a tiny vision tower."""
    cls = CONFIG_MAPPING[model_type]
    if "vision_config" not in _fields(cls):
        return _made(cls, _SIZES, _text_keys(model_type))
    default = cls()
    text = tiny_config(default.get_text_config().model_type)
    vision = _made(type(default.vision_config), _VISION, {})
    tokens = {key: 120 + i for i, key in enumerate(sorted(_fields(cls))) if key.endswith(("_token_id", "_token_index"))}
    return cls(text_config=text.to_dict(), vision_config=vision.to_dict(), **{k: v % 128 for k, v in tokens.items()})
