"""What differs between model families in how config.json spells RoPE.

The families here are tested one by one, and their config.json is read without transformers. Any other model type
works too, as long as transformers knows it: its defaults are then looked up there, which takes a second or two.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One model type's spelling.

    Attributes:
        theta_key: top-level name of the base in the transformers 4 layout.
        partial_key: top-level name of the rotated fraction of a head in that layout.
        omits_partial: True where a config may leave a rotated fraction other than 1 to transformers' default.
        local_theta_key: top-level name of the local layers' base, for models with one RoPE per layer type.
        per_layer_type: True where `rope_parameters` is nested by layer type; only full attention is extended.
        head_dim_key: where the rotated head size is written.
        omits_head_dim: True where a config may leave a head size other than hidden_size / num_attention_heads to
            transformers' default.
        writes_head_dim: False where transformers computes head_dim itself and refuses to have it set.
        alternates: True where some layers may slide and others not, which old configs leave to transformers' code.
        rope_types: the types the family's config accepts, or None for all of them.
        old_type_key: how `rope_scaling` of the transformers 4 layout names the type.
    """

    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    omits_partial: bool = False
    local_theta_key: str | None = None
    per_layer_type: bool = False
    head_dim_key: str = "head_dim"
    omits_head_dim: bool = False
    writes_head_dim: bool = True
    alternates: bool = False
    rope_types: frozenset[str] | None = None
    old_type_key: str = "rope_type"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "qwen2": Family(),
    "falcon": Family(writes_head_dim=False),
    "gemma": Family(omits_head_dim=True),
    "gemma2": Family(omits_head_dim=True, alternates=True),
    "gemma3_text": Family(per_layer_type=True, local_theta_key="rope_local_base_freq", omits_head_dim=True),
    "gpt_neox": Family(theta_key="rotary_emb_base", partial_key="rotary_pct", omits_partial=True),
    "olmo": Family(old_type_key="type"),  # transformers 4 takes exactly {"type", "factor"} here
    "olmo2": Family(old_type_key="type"),
    "olmo3": Family(per_layer_type=True),
    "phi": Family(omits_partial=True),
    "phi3": Family(rope_types=frozenset({"default", "longrope"})),
    "phimoe": Family(rope_types=frozenset({"default", "longrope"})),  # others lack the short_mscale that it demands
    "qwen3": Family(omits_head_dim=True),
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


# A family without a row: everything may be left to the defaults of transformers.
UNLISTED = Family(omits_partial=True, omits_head_dim=True)


def family_of(model_type: str) -> Family:
    """Return the row of `model_type`, or `UNLISTED`."""
    return FAMILIES.get(model_type, UNLISTED)
