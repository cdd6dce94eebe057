"""The rotary modules of a loaded model: found, reset, held at one length, and exchanged for those of another config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from longext.checkpoint import _built

LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types that follow the length of the sequence


def rope_type_of(model: Any) -> str:
    """Return the rope_type of a model's text part: the one that follows the length, if any; else of full attention."""
    parameters = model.config.get_text_config().rope_parameters
    if parameters.get("alpha") and any(module.rope_type == "ntk_alpha" for module in rotary_modules(model)):
        return "default"  # HunYuan's fixed base under the name "dynamic"
    nested = [rope for rope in parameters.values() if isinstance(rope, dict)]
    kinds = [rope["rope_type"] for rope in nested or [parameters] if rope.get("rope_type")]
    chosen = parameters.get("full_attention") or (nested or [parameters])[0]
    kind: str = next((kind for kind in kinds if kind in LENGTH_DEPENDENT), chosen["rope_type"])
    return kind


def rotary_modules(model: Any) -> list[Any]:
    """Return the rotary embedding modules of a transformers model's text part."""
    return [module for module in _built.rotary_modules(model).values() if hasattr(module, "rope_type")]


def reset_rotary(module: Any) -> None:
    """Put a rotary module that follows the length back to its state after loading."""
    originals = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("original_inv_freq")]
    for name in originals:
        prefix = name.removesuffix("original_inv_freq")
        module.register_buffer(f"{prefix}inv_freq", getattr(module, name).clone(), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def rebuild_rope(model: Any, config: Any) -> None:
    """Make a loaded model the one that `config` (a transformers config) builds; its weights stay.

    A second model is built on the meta device; rotary modules, and plain values that constructors computed (softmax
    scales, lengths), are taken over from there, module by module.
    """
    attention = model.config.get_text_config()._attn_implementation
    with torch.device("meta"):
        twin = type(model)._from_config(config, attn_implementation=attention, dtype=model.dtype)
    modules, rotary = dict(model.named_modules()), _built.rotary_modules(twin)
    for name, theirs in twin.named_modules():
        if name in rotary:
            parent, _, own_name = name.rpartition(".")
            device = next(modules[name].buffers()).device
            setattr(modules[parent], own_name, type(theirs)(config=theirs.config).to(device))
        elif name in modules:
            _take_values(modules[name], theirs)


def _take_values(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy numbers and configs that the constructor left in a module; what belongs to a mode of use stays."""
    for key, value in vars(theirs).items():
        is_value = isinstance(value, (bool, int, float, str, type(None))) or key == "config"
        if is_value and not key.startswith("_") and key not in ("training", "gradient_checkpointing", "name_or_path"):
            setattr(ours, key, value)


def hold_rope(model: nn.Module, length: int) -> None:
    """Give every rotary module permanently the rotation that it has for a sequence of `length` tokens."""
    for module in rotary_modules(model):
        weight = next(model.parameters())
        last = torch.tensor([[length - 1]], device=weight.device)
        kind = module.rope_type
        for layer_type in kind if isinstance(kind, dict) else [None]:
            _built.rotate(module, last, layer_type)
        # transformers updates by name: "default" is never updated
        module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"


@contextlib.contextmanager
def held_rotation(model: nn.Module, length: int) -> Iterator[None]:
    """While open, every rotary module has the rotation of a sequence of `length` tokens, whatever part it is given."""
    kinds = [(module, module.rope_type) for module in rotary_modules(model)]
    hold_rope(model, length)
    try:
        yield
    finally:
        for module, kind in kinds:
            module.rope_type = kind
