"""The sizes of a decoder, from its config.json alone: what the closed forms of cost are made of.

Families that have a `Layout` are read without transformers. Keys that a file leaves to defaults are looked up there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.checkpoint.families import EMBEDDING_NAMES, FAMILIES, HEAD_NAMES, Family, Layout, family_of
from longext.checkpoint.load import load_config
from longext.checkpoint.source import read_config
from longext.checkpoint.tying import stored_difference
from longext.checkpoint.weights import StoredTensor, read_shards, tensors_of
from longext.errors import CheckpointError
from longext.registry import did_you_mean

_NOT_PARAMETERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")  # buffers in old checkpoints
_HEADS = tuple(f"{name}.weight" for name in HEAD_NAMES)
_EMBEDDINGS = tuple(f"{name}.weight" for name in EMBEDDING_NAMES)
_NOT_LANGUAGE = ("vision", "multi_modal")  # the other half of a multimodal checkpoint


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a dense decoder.

    Attributes:
        layout: what its layers are made of.
        fused: q, k and v are one matrix.
        attention_biases, mlp_biases: bias elements of one layer.
        tied: the output matrix is the embedding.
        has_sliding_layers: some layers see a window only (they are counted as dense, which is an upper bound).
        caps_scores: attention scores pass a soft cap, which SDPA has not.
        counted: parameters in the safetensors headers, or None if there are no weights.
    """

    model_type: str
    layout: Layout
    fused: bool
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
        return self.hidden_size * self.intermediate_size * (3 if self.layout.gated else 2)

    @property
    def head_weights(self) -> int:
        """Elements of the output matrix."""
        return self.hidden_size * self.vocab_size

    @property
    def stream_norm_weights(self) -> int:
        """Elements of the norms over the hidden size, the last one included (what LongLoRA trains)."""
        each = self.hidden_size * (2 if self.layout.norm_has_bias else 1)
        return (self.num_layers * self.layout.num_norms + 1) * each

    @property
    def norm_weights(self) -> int:
        """Elements of all norms, those of queries and keys too."""
        heads = {"head": 2 * self.head_dim, "full": self.query_size + self.kv_size}
        return self.stream_norm_weights + self.num_layers * heads.get(self.layout.query_key_norm or "", 0)

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
        inputs = (hidden + query + 2 * kv) if self.fused else (hidden + query) + 2 * (hidden + kv)
        return self.num_layers * rank * (inputs + query + hidden)


def read_shape(directory: Path) -> ModelShape:
    """Return the shape of the model in `directory`; config.json is enough, weights are counted if they are there.

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
    family, known = family_of(model_type), [name for name, row in FAMILIES.items() if row.layout]
    if family.layout is None:
        raise CheckpointError(
            f"{directory} is a model of type '{model_type}', whose cost `longext plan` does not know. "
            f"{did_you_mean(model_type, known)}"
        )
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    head_dim_by_default = family.omits_head_dim and not text.get("head_dim")
    kv_by_default = family.layout.groups_heads and not text.get("num_key_value_heads")
    if head_dim_by_default or kv_by_default or any(not text.get(key) for key in required):
        loaded = load_config(directory)
        text = (getattr(loaded, section) if section else loaded).to_dict()
    return _shape(text, model_type, family, family.layout, directory)


def _refuse_experts(text: Mapping[str, Any], model_type: str, directory: Path) -> None:
    keys = [key for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") if text.get(key)]
    if keys:
        raise CheckpointError(
            f"{directory} ({model_type}) is a mixture of experts (`{keys[0]}`: {text[keys[0]]}); "
            "`longext plan` knows dense decoders only. Plan a dense model of its active size for FLOPs."
        )


def _shape(text: Mapping[str, Any], model_type: str, family: Family, layout: Layout, directory: Path) -> ModelShape:
    def size(key: str) -> int:
        value = text.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{directory / 'config.json'}: `{key}` must be a whole number >= 1, got {value!r}.")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or hidden // heads
    intermediate = size("intermediate_size")
    return ModelShape(
        model_type=model_type,
        layout=layout,
        fused="qkv" in family.projections,
        hidden_size=hidden,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=size("vocab_size"),
        tied=bool(text.get("tie_word_embeddings", layout.tied)),
        attention_biases=_attention_biases(text, layout, hidden, heads * head_dim, kv_heads * head_dim),
        mlp_biases=_mlp_biases(text, layout, hidden, intermediate),
        has_sliding_layers=_has_sliding_layers(text),
        caps_scores=bool(text.get("attn_logit_softcapping", layout.caps_scores)),
    )


def _attention_biases(text: Mapping[str, Any], layout: Layout, hidden: int, query: int, kv: int) -> int:
    which = layout.attention_bias
    if which == "key":
        which = "qkvo" if text.get("attention_bias") else ""
    elif which == "qkvo" and text.get("attention_bias") is False:
        which = ""
    return (query + 2 * kv if "qkv" in which else 0) + (hidden if which.endswith("o") else 0)


def _mlp_biases(text: Mapping[str, Any], layout: Layout, hidden: int, intermediate: int) -> int:
    has_bias = layout.mlp_bias or bool(text.get("mlp_bias"))
    return (intermediate * (2 if layout.gated else 1) + hidden) if has_bias else 0


def _has_sliding_layers(text: Mapping[str, Any]) -> bool:
    kinds = text.get("layer_types")
    window = bool(text.get("sliding_window")) and bool(text.get("use_sliding_window", True))
    return window and (not kinds or any(kind != "full_attention" for kind in kinds))


def _holds_another_head(tensors: Mapping[str, StoredTensor], directory: Path) -> bool:
    """True if the files hold an output matrix that is not the embedding, whatever the config says."""
    heads = [name for name in tensors if name.endswith(_HEADS)]
    entries = [name for name in tensors if name.endswith(_EMBEDDINGS)]
    return bool(heads and entries) and bool(stored_difference(tensors, entries[0], heads[0], True, directory))


def _with_count(shape: ModelShape, directory: Path) -> ModelShape:
    """Add the exact count from the safetensors headers, if the directory has weights."""
    if not any(directory.glob("*.safetensors*")):
        return shape
    counted, tensors = 0, tensors_of(read_shards(directory))
    if shape.tied and _holds_another_head(tensors, directory):
        shape = dataclasses.replace(shape, tied=False)
    for name, tensor in tensors.items():
        is_copy = shape.tied and name.endswith(_HEADS)
        is_language = not any(part in name for part in _NOT_LANGUAGE)
        if is_language and not is_copy and not name.endswith(_NOT_PARAMETERS):
            counted += math.prod(tensor.shape)
    return dataclasses.replace(shape, counted=counted)
