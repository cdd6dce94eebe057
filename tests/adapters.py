"""Adapters made with peft itself, as if trained: every trainable tensor moved by seeded noise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extended_config, plan_extension, provenance
from longext.conversion.files import write_json
from longext.manifest import write_manifest

# projections inside attention, where they are not q, k, v, o
FUSED = {
    "gpt_neox": ["query_key_value", "dense"],
    "falcon": ["query_key_value", "dense"],
    "phi3": ["qkv_proj", "o_proj"],
    "phi": ["q_proj", "v_proj", "dense"],
}


def make_adapter(base: Path, directory: Path, *, norms: bool = True, embedding: bool = True, **keys: Any) -> Path:
    """Save an adapter of `base` to `directory`: LoRA on attention, and copies of embedding and norms."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = dict(model.named_modules())
    saved = [name for name, module in names.items() if module is model.get_input_embeddings()] if embedding else []
    saved += [n for n, module in names.items() if norms and "norm" in n.split(".")[-1] and [*module.parameters()]]
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "modules_to_save": saved or None,
        "ensure_weight_tying": True,
        "task_type": "CAUSAL_LM",
        **keys,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**settings))
        _train(adapted)
        adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory


def _train(adapted: PeftModel) -> None:
    """Random steps in place of training: five percent of each tensor's own spread, at least 0.01 for LoRA's zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                spread = parameter.std() if parameter.numel() > 1 else parameter.abs().max()
                step = max(0.05 * float(spread), 0.02 if "lora_" in name else 0.005)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * step)


def add_rope(directory: Path, base: Path | str, method: str = "yarn", factor: float = 8.0, **keys: Any) -> Path:
    """Put beside an adapter what `longext finetune` does: config.json with the RoPE, run.json with its record."""
    asked = ExtendConfig(model=str(base), method=method, factor=factor, **keys)
    plan = plan_extension(asked)
    write_json(directory / "config.json", extended_config(plan))
    write_manifest(directory, "finetune", asked, extension={**provenance(plan), "trained": True})
    return directory


def peft_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return peft's own merge in float32, by the names that transformers would save it under."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    target = adapter.parent / f"peft-{adapter.name}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").merge_and_unload()
        merged.save_pretrained(target)
    return load_tensors(target)


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, its shards together."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def edit_adapter(directory: Path, edit: Any) -> None:
    """Rewrite the adapter's tensors: `edit` changes the dict in place."""
    tensors = load_file(directory / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
