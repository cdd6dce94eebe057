"""Sizes of well-known models, so that a plan needs neither a directory nor a connection.

Each entry holds the keys of config.json that cost depends on. The parameter counts they give are held to the published
ones in tests/unit/test_plan_builtin.py.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longext.registry import Registry

BUILT_IN: Registry[dict[str, Any]] = Registry("model size")

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "use_sliding_window": False, "head_dim": 128},
    "gemma2": {"model_type": "gemma2", "head_dim": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 1024},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "olmo2": {"model_type": "olmo2"},
}

# name: family, hidden size, layers, heads, key-value heads, intermediate size, vocabulary, tied, what differs
_SIZES: dict[str, tuple[str, int, int, int, int, int, int, bool, dict[str, Any]]] = {
    "llama2-7b": ("llama", 4096, 32, 32, 32, 11008, 32000, False, {}),
    "llama2-13b": ("llama", 5120, 40, 40, 40, 13824, 32000, False, {}),
    "llama2-70b": ("llama", 8192, 80, 64, 8, 28672, 32000, False, {}),
    "llama3-8b": ("llama", 4096, 32, 32, 8, 14336, 128256, False, {}),
    "llama3-70b": ("llama", 8192, 80, 64, 8, 28672, 128256, False, {}),
    "llama3.1-8b": ("llama", 4096, 32, 32, 8, 14336, 128256, False, {}),
    "llama3.1-70b": ("llama", 8192, 80, 64, 8, 28672, 128256, False, {}),
    "llama3.2-1b": ("llama", 2048, 16, 32, 8, 8192, 128256, True, {}),
    "llama3.2-3b": ("llama", 3072, 28, 24, 8, 8192, 128256, True, {}),
    "tinyllama-1.1b": ("llama", 2048, 22, 32, 4, 5632, 32000, False, {}),
    "smollm2-135m": ("llama", 576, 30, 9, 3, 1536, 49152, True, {}),
    "smollm2-360m": ("llama", 960, 32, 15, 5, 2560, 49152, True, {}),
    "smollm2-1.7b": ("llama", 2048, 24, 32, 32, 8192, 49152, True, {}),
    "mistral-7b": ("mistral", 4096, 32, 32, 8, 14336, 32768, False, {}),
    "qwen2.5-0.5b": ("qwen2", 896, 24, 14, 2, 4864, 151936, True, {}),
    "qwen2.5-1.5b": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True, {}),
    "qwen2.5-3b": ("qwen2", 2048, 36, 16, 2, 11008, 151936, True, {}),
    "qwen2.5-7b": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False, {}),
    "qwen2.5-14b": ("qwen2", 5120, 48, 40, 8, 13824, 152064, False, {}),
    "qwen2.5-32b": ("qwen2", 5120, 64, 40, 8, 27648, 152064, False, {}),
    "qwen2.5-72b": ("qwen2", 8192, 80, 64, 8, 29568, 152064, False, {}),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 3072, 151936, True, {}),
    "qwen3-1.7b": ("qwen3", 2048, 28, 16, 8, 6144, 151936, True, {}),
    "qwen3-4b": ("qwen3", 2560, 36, 32, 8, 9728, 151936, True, {}),
    "qwen3-8b": ("qwen3", 4096, 36, 32, 8, 12288, 151936, False, {}),
    "qwen3-14b": ("qwen3", 5120, 40, 40, 8, 17408, 151936, False, {}),
    "qwen3-32b": ("qwen3", 5120, 64, 64, 8, 25600, 151936, False, {}),
    "gemma2-9b": ("gemma2", 3584, 42, 16, 8, 14336, 256000, True, {}),
    "gemma3-1b": ("gemma3", 1152, 26, 4, 1, 6912, 262144, True, {"sliding_window": 512}),
    "gemma3-4b": ("gemma3", 2560, 34, 8, 4, 10240, 262208, True, {}),
    "gemma3-12b": ("gemma3", 3840, 48, 16, 8, 15360, 262208, True, {}),
    "gemma3-27b": ("gemma3", 5376, 62, 32, 16, 21504, 262208, True, {"head_dim": 128}),
    "phi3-mini": ("phi3", 3072, 32, 32, 32, 8192, 32064, False, {}),
    "olmo2-7b": ("olmo2", 4096, 32, 32, 32, 11008, 100352, False, {}),
}

for _name, (_family, _hidden, _layers, _heads, _kv_heads, _inner, _vocabulary, _tied, _more) in _SIZES.items():
    _config = {
        **_FAMILIES[_family],
        "hidden_size": _hidden,
        "num_hidden_layers": _layers,
        "num_attention_heads": _heads,
        "num_key_value_heads": _kv_heads,
        "intermediate_size": _inner,
        "vocab_size": _vocabulary,
        "tie_word_embeddings": _tied,
        **_more,
    }
    BUILT_IN.register(_name, _config)


@contextlib.contextmanager
def config_directory(name: str, source: Path | None) -> Iterator[Path]:
    """Yield `source`, or for a built-in size (None) a directory with its config.json, which is gone afterwards."""
    if source is not None:
        yield source
        return
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "config.json").write_text(json.dumps(BUILT_IN[name]), encoding="utf-8")
        yield Path(made)
