"""A micro checkpoint with a real tokenizer, whole and broken in the ways that files break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from families import save_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from longext.checkpoint.bundled import BUNDLED_MODELS

BOOKS = BUNDLED_MODELS["books-5m"]
MARKER = "remote-code-ran"
_REMOTE = f"""
from pathlib import Path
Path(__file__).with_name("{MARKER}").touch()
Path("{MARKER}").touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
"""
State = dict[str, torch.Tensor]


def make_micro(directory: Path, **keys: object) -> Path:
    """Save a two-layer Llama of 16 dimensions with books-5m's tokenizer."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_tiny_model(LlamaConfig(**{**sizes, **tokens, "max_position_embeddings": 512, **keys}), directory)
    for file in BOOKS.glob("*token*.json"):
        shutil.copy(file, directory)
    return directory


def edit_weights(directory: Path, edit: Callable[[State], State]) -> Path:
    """Rewrite model.safetensors."""
    file = directory / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in edit(load_file(file)).items()}
    save_file(state, file, {"format": "pt"})
    return directory


def edit_config(directory: Path, **changes: object) -> Path:
    """Rewrite config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


def add_chat_tokens(directory: Path, *tokens: str) -> Path:
    """Add special tokens to the tokenizer alone, as a fine-tune that forgot to resize does."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.save_pretrained(directory)
    return directory


def add_remote_code(directory: Path, model_type: str) -> Path:
    """Give the checkpoint code of its own, which leaves a file where it is run."""
    (directory / "remote.py").write_text(_REMOTE)
    auto_map = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    return edit_config(directory, model_type=model_type, auto_map=auto_map)


def _nan(state: State) -> State:
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    return state


_LAYER = "layers.1."
# what was done to the weights -> (edit, what the message says)
BROKEN: dict[str, tuple[Callable[[State], State], tuple[str, ...]]] = {
    "layer missing": (
        lambda s: {k: v for k, v in s.items() if _LAYER not in k},
        ("lacks 'model.layers.1.input_layernorm.weight' (9 weight(s) missing)", "layer(s) 1"),
    ),
    "torch.compile": (
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        ("lacks 'lm_head.weight' (21 weight(s) missing)", "'_orig_mod.'", "torch.compile"),
    ),
    "no head": (
        lambda s: {k: v for k, v in s.items() if k != "lm_head.weight"},
        ("lacks 'lm_head.weight' (1 weight(s) missing)", "tie_word_embeddings"),
    ),
    "other shape": (
        lambda s: {**s, "model.norm.weight": torch.ones(17)},
        ("'model.norm.weight' is 17 in the files and 16 by config.json (1 such weight(s))",),
    ),
    "layer too many": (
        lambda s: {**s, **{k.replace(_LAYER, "layers.2."): v for k, v in s.items() if _LAYER in k}},
        ("holds 'model.layers.2.input_layernorm.weight'", "9 weight(s) left over; num_hidden_layers is 2"),
    ),
    "NaN": (_nan, ("'model.layers.1.mlp.up_proj.weight' holds 1 of 384 values that are NaN or infinite",)),
    "integers": (
        lambda s: {k: v.to(torch.int32) if "norm" in k else v for k, v in s.items()},
        ("'model.layers.0.input_layernorm.weight' is stored as I32",),
    ),
}
