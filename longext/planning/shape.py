"""The sizes of a decoder, from its config.json alone: what the closed forms of cost are made of.

The families in `FAMILIES` are read without transformers. Keys that a file leaves to defaults are looked up there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.checkpoint.load import load_config
from longext.checkpoint.source import Shard, read_config, read_shards
from longext.checkpoint.tying import stored_difference
from longext.errors import CheckpointError
from longext.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class FamilyLayout:
    """What a model type has besides the common matrices.

    Attributes:
        gated: the MLP has a gate and an up projection (SwiGLU and its kin), else one input projection.
        num_norms: norms over the hidden size in a layer.
        norm_has_bias: the norms are LayerNorms with weight and bias.
        query_key_norm: None, "head" (one weight per head dimension) or "full" (one per projected dimension).
        post_norm: a norm follows the MLP, so its output matrix is recomputed under gradient checkpointing.
        parallel: attention and MLP read the same input, so neither is behind the other.
        tied: the default of `tie_word_embeddings`.
        fused: q, k and v are one matrix.
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
    fused: bool = False
    attention_bias: str = "key"
    mlp_bias: bool = False


FAMILIES: dict[str, FamilyLayout] = {
    "llama": FamilyLayout(),
    "mistral": FamilyLayout(attention_bias=""),
    "qwen2": FamilyLayout(attention_bias="qkv"),
    "qwen3": FamilyLayout(query_key_norm="head"),
    "gemma": FamilyLayout(tied=True),
    "gemma2": FamilyLayout(tied=True, num_norms=4, post_norm=True),
    "gemma3_text": FamilyLayout(tied=True, num_norms=4, post_norm=True, query_key_norm="head"),
    "olmo2": FamilyLayout(query_key_norm="full", post_norm=True),
    "olmo3": FamilyLayout(query_key_norm="full", post_norm=True),
    "phi3": FamilyLayout(fused=True, attention_bias=""),
    "gpt_neox": FamilyLayout(
        gated=False, norm_has_bias=True, parallel=True, fused=True, attention_bias="qkvo", mlp_bias=True
    ),
}
_NOT_PARAMETERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")  # buffers in old checkpoints
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")
_NOT_LANGUAGE = ("vision", "multi_modal")  # the other half of a multimodal checkpoint


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a dense decoder.

    Attributes:
        family: its row in `FAMILIES`.
        attention_biases, mlp_biases: bias elements of one layer.
        tied: the output matrix is the embedding.
        has_sliding_layers: some layers see a window only (they are counted as dense, which is an upper bound).
        caps_scores: attention scores pass a soft cap, which SDPA has not.
        counted: parameters in the safetensors headers, or None where no weights are there.
    """

    model_type: str
    family: FamilyLayout
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    attention_biases: int = 0
    mlp_biases: int = 0
    has_sliding_layers: bool = False
    caps_scores: bool = False
    counted: int | None = None

    @property
    def query_size(self) -> int:
        """Width of all query heads, num_heads x head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def projection_weights(self) -> int:
        """Elements of the q, k, v and o matrices of one layer."""
        return self.hidden_size * (2 * self.query_size + 2 * self.kv_size)

    @property
    def mlp_weights(self) -> int:
        """Elements of the MLP's matrices of one layer."""
        return self.hidden_size * self.intermediate_size * (3 if self.family.gated else 2)

    @property
    def head_weights(self) -> int:
        """Elements of the output matrix."""
        return self.hidden_size * self.vocab_size

    @property
    def stream_norm_weights(self) -> int:
        """Elements of the norms over the hidden size, the last one included (what LongLoRA trains)."""
        each = self.hidden_size * (2 if self.family.norm_has_bias else 1)
        return (self.num_layers * self.family.num_norms + 1) * each

    @property
    def norm_weights(self) -> int:
        """Elements of all norms, those of queries and keys too."""
        heads = {"head": 2 * self.head_dim, "full": self.query_size + self.kv_size}
        return self.stream_norm_weights + self.num_layers * heads.get(self.family.query_key_norm or "", 0)

    @property
    def layer_weights(self) -> int:
        """Elements of one layer without its norms."""
        return self.projection_weights + self.mlp_weights + self.attention_biases + self.mlp_biases

    @property
    def num_parameters(self) -> int:
        """All parameters by the closed form; a tied matrix counts once."""
        return self.num_layers * self.layer_weights + self.norm_weights + self.head_weights * (1 if self.tied else 2)

    def lora_weights(self, rank: int) -> int:
        """Return the elements of LoRA adapters of `rank` on q, k, v and o of all layers (a fused qkv takes one)."""
        hidden, query, kv = self.hidden_size, self.query_size, self.kv_size
        inputs = (hidden + query + 2 * kv) if self.family.fused else (hidden + query) + 2 * (hidden + kv)
        return self.num_layers * rank * (inputs + query + hidden)


def read_shape(directory: Path) -> ModelShape:
    """Return the shape of the model in `directory`; config.json is enough, weights are counted where they are.

    Raises:
        CheckpointError: no config.json, a mixture of experts, an unknown model type or a missing size.
    """
    return _with_count(shape_of(read_config(directory), directory), directory)


def shape_of(config: Mapping[str, Any], directory: Path) -> ModelShape:
    """Return the shape that a parsed config.json describes; `directory` is for messages and defaults."""
    section = "text_config" if isinstance(config.get("text_config"), Mapping) else None
    text = dict(config[section]) if section else dict(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    _refuse_experts(text, model_type, directory)
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{directory} is a model of type '{model_type}', whose cost `longext plan` does not know. "
            f"{did_you_mean(model_type, FAMILIES)}"
        )
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    head_dim_by_default = model_type in ("qwen3", "gemma", "gemma2", "gemma3_text") and not text.get("head_dim")
    kv_by_default = model_type != "gpt_neox" and not text.get("num_key_value_heads")
    if head_dim_by_default or kv_by_default or any(not text.get(key) for key in required):
        loaded = load_config(directory)
        text = (getattr(loaded, section) if section else loaded).to_dict()
    return _shape(text, model_type, directory)


def _refuse_experts(text: Mapping[str, Any], model_type: str, directory: Path) -> None:
    keys = [key for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") if text.get(key)]
    if keys:
        raise CheckpointError(
            f"{directory} ({model_type}) is a mixture of experts (`{keys[0]}`: {text[keys[0]]}); "
            "`longext plan` knows dense decoders only. Plan a dense model of its active size for FLOPs."
        )


def _shape(text: Mapping[str, Any], model_type: str, directory: Path) -> ModelShape:
    def size(key: str) -> int:
        value = text.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{directory / 'config.json'}: `{key}` must be a whole number >= 1, got {value!r}.")
        return value

    family, hidden, heads = FAMILIES[model_type], size("hidden_size"), size("num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or hidden // heads
    intermediate = size("intermediate_size")
    return ModelShape(
        model_type=model_type,
        family=family,
        hidden_size=hidden,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=size("vocab_size"),
        tied=bool(text.get("tie_word_embeddings", family.tied)),
        attention_biases=_attention_biases(text, family, hidden, heads * head_dim, kv_heads * head_dim),
        mlp_biases=_mlp_biases(text, family, hidden, intermediate),
        has_sliding_layers=_has_sliding_layers(text),
        caps_scores=bool(text.get("attn_logit_softcapping", model_type == "gemma2")),
    )


def _attention_biases(text: Mapping[str, Any], family: FamilyLayout, hidden: int, query: int, kv: int) -> int:
    which = family.attention_bias
    if which == "key":
        which = "qkvo" if text.get("attention_bias") else ""
    elif which == "qkvo" and text.get("attention_bias") is False:
        which = ""
    return (query + 2 * kv if "qkv" in which else 0) + (hidden if which.endswith("o") else 0)


def _mlp_biases(text: Mapping[str, Any], family: FamilyLayout, hidden: int, intermediate: int) -> int:
    has_bias = family.mlp_bias or bool(text.get("mlp_bias"))
    return (intermediate * (2 if family.gated else 1) + hidden) if has_bias else 0


def _has_sliding_layers(text: Mapping[str, Any]) -> bool:
    kinds = text.get("layer_types")
    window = bool(text.get("sliding_window")) and bool(text.get("use_sliding_window", True))
    return window and (not kinds or any(kind != "full_attention" for kind in kinds))


def _holds_another_head(shards: list[Shard], directory: Path) -> bool:
    """True if the files hold an output matrix that is not the embedding, whatever the config says."""
    names = [name for shard in shards for name in shard.tensors]
    heads = [name for name in names if name.endswith(_HEADS)]
    entries = [name for name in names if name.endswith(_EMBEDDINGS)]
    return bool(heads and entries) and bool(stored_difference(shards, entries[0], heads[0], True, directory))


def _with_count(shape: ModelShape, directory: Path) -> ModelShape:
    """Add the exact count from the safetensors headers, where the directory has weights."""
    if not any(directory.glob("*.safetensors*")):
        return shape
    counted, shards = 0, read_shards(directory)
    if shape.tied and _holds_another_head(shards, directory):
        shape = dataclasses.replace(shape, tied=False)
    for shard in shards:
        for name, (_, dimensions, *_) in shard.tensors.items():
            is_copy = shape.tied and name.endswith(_HEADS)
            is_language = not any(part in name for part in _NOT_LANGUAGE)
            if is_language and not is_copy and not name.endswith(_NOT_PARAMETERS):
                counted += math.prod(dimensions)
    return dataclasses.replace(shape, counted=counted)
