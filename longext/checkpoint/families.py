"""What differs between model families: how config.json spells RoPE, what layers are made of, names of projections.

One row per family, tested one by one; their config.json is read without transformers. Any other model type works too,
as long as transformers knows it: its defaults are then looked up there, which takes a second or two. But `longext plan`
knows only families that have a `Layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_SEPARATE = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_FUSED = {"qkv": "query_key_value", "o": "dense"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a layer has besides the common matrices.

    Attributes:
        gated: the MLP has a gate and an up projection (SwiGLU and its kin), else one input projection.
        num_norms: norms over the hidden size in a layer.
        norm_has_bias: the norms are LayerNorms with weight and bias.
        query_key_norm: None, "head" (one weight per head dimension) or "full" (one per projected dimension).
        post_norm: a norm follows the MLP, so its output matrix is recomputed under gradient checkpointing.
        parallel: attention and MLP read the same input, so neither is behind the other.
        tied: the default of `tie_word_embeddings`.
        groups_heads: `num_key_value_heads` is a key of its config, with a default of its own.
        caps_scores: attention scores pass a soft cap by default.
        attention_bias: which of the attention projections have a bias ("", "qkv", "qkvo", or the config's key).
        mlp_bias: the MLP's projections have biases.
    """

    gated: bool = True
    num_norms: int = 2
    norm_has_bias: bool = False
    query_key_norm: str | None = None
    post_norm: bool = False
    parallel: bool = False
    tied: bool = False
    groups_heads: bool = True
    caps_scores: bool = False
    attention_bias: str = "key"
    mlp_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model type.

    Attributes:
        theta_key: top-level name of the base in the transformers 4 layout.
        partial_key: top-level name of the rotated fraction of a head in that layout.
        omits_rope: a config may leave every key of RoPE to transformers' defaults.
        omits_partial: a config may leave a rotated fraction other than 1 to transformers' default.
        local_theta_key: top-level name of the local layers' base, for models with one RoPE per layer type.
        per_layer_type: `rope_parameters` is nested by layer type; only full attention is extended.
        head_dim_key: where the rotated head size is written.
        omits_head_dim: a config may leave a head size other than hidden_size / num_attention_heads to transformers'
            default.
        writes_head_dim: False if transformers computes head_dim itself and refuses to have it set.
        alternates: some layers may slide and others not, which old configs leave to transformers' code.
        rope_types: the types the family's config accepts, or None for all of them.
        old_type_key: how `rope_scaling` of the transformers 4 layout names the type.
        top_level_length: `original_max_position_embeddings` is written at the top level, whatever the type.
        projections: the linear layers of attention by role (letters of "qkvo"; one fused layer for several).
        layout: what its layers are made of, for `longext plan`; None if it does not know.
    """

    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    omits_rope: bool = False
    omits_partial: bool = False
    local_theta_key: str | None = None
    per_layer_type: bool = False
    head_dim_key: str = "head_dim"
    omits_head_dim: bool = False
    writes_head_dim: bool = True
    alternates: bool = False
    rope_types: frozenset[str] | None = None
    old_type_key: str = "rope_type"
    top_level_length: bool = False
    projections: Mapping[str, str] = field(default_factory=lambda: _SEPARATE)
    layout: Layout | None = None


_LONGROPE_ONLY = frozenset({"default", "longrope"})

FAMILIES: dict[str, Family] = {
    "llama": Family(omits_rope=True, layout=Layout()),
    "mistral": Family(omits_rope=True, layout=Layout(attention_bias="")),
    "mixtral": Family(),
    "qwen2": Family(layout=Layout(attention_bias="qkv")),
    "falcon": Family(omits_rope=True, writes_head_dim=False, projections=_FUSED),
    "gemma": Family(omits_rope=True, omits_head_dim=True, layout=Layout(tied=True)),
    "gemma2": Family(
        omits_rope=True,
        omits_head_dim=True,
        alternates=True,
        layout=Layout(tied=True, num_norms=4, post_norm=True, caps_scores=True),
    ),
    "gemma3_text": Family(
        omits_rope=True,
        per_layer_type=True,
        local_theta_key="rope_local_base_freq",
        omits_head_dim=True,
        layout=Layout(tied=True, num_norms=4, post_norm=True, query_key_norm="head"),
    ),
    "gpt_neox": Family(
        theta_key="rotary_emb_base",
        partial_key="rotary_pct",
        omits_rope=True,
        omits_partial=True,
        projections=_FUSED,
        layout=Layout(
            gated=False, norm_has_bias=True, parallel=True, groups_heads=False, attention_bias="qkvo", mlp_bias=True
        ),
    ),
    "olmo": Family(omits_rope=True, old_type_key="type"),  # transformers 4 takes exactly {"type", "factor"} here
    "olmo2": Family(old_type_key="type", layout=Layout(query_key_norm="full", post_norm=True)),
    "olmo3": Family(per_layer_type=True, layout=Layout(query_key_norm="full", post_norm=True)),
    "phi": Family(omits_partial=True, projections={**_SEPARATE, "o": "dense"}),
    "phi3": Family(
        omits_rope=True,
        rope_types=_LONGROPE_ONLY,
        top_level_length=True,
        projections={"qkv": "qkv_proj", "o": "o_proj"},
        layout=Layout(attention_bias=""),
    ),
    "phimoe": Family(rope_types=_LONGROPE_ONLY),  # others lack the short_mscale that it demands
    "qwen3": Family(omits_head_dim=True, layout=Layout(query_key_norm="head")),
    "stablelm": Family(omits_partial=True),
}

# Model types without a RoPE that a config can change, and what they have instead.
WITHOUT_ROPE = {
    "bert": "learned absolute positions",
    "bloom": "ALiBi",
    "codegen": "RoPE hard-wired in its code",
    "dbrx": "transformers 5 ignores the base that its attn_config holds",
    "gpt2": "learned absolute positions",
    "gpt_bigcode": "learned absolute positions",
    "gpt_neo": "learned absolute positions",
    "gptj": "RoPE hard-wired in its code",
    "mamba": "no positions (a state-space model)",
    "mamba2": "no positions (a state-space model)",
    "mpt": "ALiBi",
    "opt": "learned absolute positions",
    "rwkv": "no positions (a recurrent model)",
    "t5": "relative position biases",
}


# A family without a row: everything may be left to the defaults of transformers. LFM 2 has an out_proj.
UNLISTED = Family(omits_partial=True, omits_head_dim=True, projections={**_SEPARATE, "o": "out_proj"})


def family_of(model_type: str) -> Family:
    """Return the row of `model_type`, or `UNLISTED`."""
    return FAMILIES.get(model_type, UNLISTED)


def projection_names(role: str) -> tuple[str, ...]:
    """Return what families call the projections of one role: "q", "k", "v", "o", or "qkv" for a fused one."""
    rows = (*FAMILIES.values(), UNLISTED)
    return tuple(dict.fromkeys(row.projections[role] for row in rows if role in row.projections))


# What families call the matrices at both ends of a model.
HEAD_NAMES = ("lm_head", "embed_out")
EMBEDDING_NAMES = ("embed_tokens", "embed_in", "word_embeddings")
