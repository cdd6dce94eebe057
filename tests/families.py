"""Tiny random models of every family that longext supports: two layers, a vocabulary of 64, 64 positions.

Bases, head sizes and rotated fractions differ from transformers' defaults where the family allows it: a value that is
lost on the way to config.json then shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

LENGTH = 64  # max_position_embeddings of every tiny model
# what `longext plan` needs of Llama-2-7B's config.json
LLAMA2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
}
_LOCAL_AND_FULL: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _config(name: str, theta: float | None = 20_000.0, **keys: Any) -> PretrainedConfig:
    """Return a tiny `name`Config; `theta` None leaves RoPE to the class or to `keys`."""
    rope = {} if theta is None else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**{**_SIZES, **_TOKENS, **rope, **keys})
    return config


def _partial(theta: float, fraction: float) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction},
    }


def _per_layer_type(local_theta: float, full_theta: float) -> dict[str, Any]:
    kinds = {"sliding_attention": local_theta, "full_attention": full_theta}
    return {
        **_LOCAL_AND_FULL,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in kinds.items()},
    }


def _gemma3_text() -> PretrainedConfig:
    keys = _per_layer_type(20_000.0, 500_000.0)
    return _config("Gemma3Text", None, intermediate_size=48, num_key_value_heads=1, head_dim=24, **keys)


def _gemma3() -> PretrainedConfig:
    """Return the multimodal config; the image tokens are the last three of the vocabulary."""
    text = _gemma3_text()
    images = {"mm_tokens_per_image": 4, "boi_token_index": 61, "eoi_token_index": 62, "image_token_index": 63}
    config: PretrainedConfig = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config={"model_type": "siglip_vision_model", **_VISION}, **images
    )
    return config


_MLP: dict[str, Any] = {"intermediate_size": 48}
_GROUPED: dict[str, Any] = {**_MLP, "num_key_value_heads": 1}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _config("Llama", **_GROUPED),
    "mistral": lambda: _config("Mistral", **_GROUPED, sliding_window=32),
    "mixtral": lambda: _config("Mixtral", 500_000.0, **_GROUPED, num_local_experts=2, head_dim=None),
    "qwen2": lambda: _config("Qwen2", **_GROUPED),
    "qwen2.5": lambda: _config("Qwen2", 1_000_000.0, **_GROUPED),
    "qwen3": lambda: _config("Qwen3", 1_000_000.0, **_GROUPED, head_dim=24),
    "phi3": lambda: _config("Phi3", **_GROUPED),
    "gemma2": lambda: _config("Gemma2", **_GROUPED, head_dim=24, **_LOCAL_AND_FULL),
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "gpt_neox": lambda: _config("GPTNeoX", None, **_MLP, hidden_size=64, **_partial(20_000.0, 0.25)),
    "phi": lambda: _config("Phi", None, **_MLP, hidden_size=40, **_partial(20_000.0, 0.4)),
    "stablelm": lambda: _config("StableLm", None, **_MLP, num_key_value_heads=2, **_partial(20_000.0, 0.5)),
    "olmo": lambda: _config("Olmo", **_MLP),
    "olmo2": lambda: _config("Olmo2", 500_000.0, **_MLP),
    # in the old spelling transformers 5 gives OLMo 3's local layers its default base, whatever `rope_theta` says
    "olmo3": lambda: _config("Olmo3", None, **_MLP, **_per_layer_type(500_000.0, 500_000.0)),
    "falcon": lambda: _config("Falcon", alibi=False),
}


def save_tiny_model(config: PretrainedConfig, directory: Path, seed: int = 0) -> Path:
    """Save a random model of `config`, the same one for the same `seed`, and return its directory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def save_tiny_tokenizer(directory: Path, size: int = 60) -> None:
    """Save a tokenizer of `size` words, which fits every tiny model."""
    words = WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, size)}}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>").save_pretrained(directory)


def tiny_model(name: str, seed: int = 0, attention: str = "eager") -> Any:
    """Return the random model of `CONFIGS[name]` itself, dropout off."""
    config = CONFIGS[name]()
    for key in ("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
