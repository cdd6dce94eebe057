"""What a fine-tuning run trains: LoRA, LoRA with embeddings and norms (LongLoRA, arXiv 2309.12307), or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longext.checkpoint.tying import is_tied
from longext.errors import ConfigError
from longext.extras import require
from longext.models.head import decoder_of
from longext.training.config import TUNINGS, FinetuneConfig


@dataclass(frozen=True)
class Trainable:
    """What came out: parameter counts by kind, and the modules they are in."""

    tuning: str
    num_total: int
    num_trainable: int
    by_kind: dict[str, int]
    modules: list[str]


def attention_projections(model: Any) -> list[str]:
    """Return the leaf names of the linear layers inside attention modules (q, k, v, o, or a family's fused ones)."""
    names: dict[str, None] = {}
    for name, module in language_linears(model).items():
        parent = name.rsplit(".", 2)[-2] if name.count(".") else ""
        if "attn" in parent or _is_attention_linear(name, module):
            names[_leaf(name)] = None
    return sorted(names)


def language_linears(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of the language model by full name, its output matrix among them."""
    language = _language(model)
    return {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in language
    }  # fmt: skip


def _language(model: Any) -> set[int]:
    """Return the ids of the modules that a text goes through: a vision tower is none of them."""
    head = model.get_output_embeddings()
    return {id(module) for module in (*decoder_of(model).modules(), *([] if head is None else head.modules()))}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_attention_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and any(part in ("attention", "self_attention") for part in name.split("."))


def norm_modules(model: Any, which: str = "all") -> list[str]:
    """Return the full names of the normalisation layers of the language model.

    LongLoRA trains every parameter with "norm" in its name (its `fine-tune.py`), so the norms inside attention heads
    belong to it (q_norm and k_norm of Qwen 3, Gemma 3, OLMo 2); `which="residual"` leaves those alone.
    """
    hidden = model.config.get_text_config().hidden_size
    language = _language(model)
    names = [name for name, module in model.named_modules() if id(module) in language and is_norm(name, module)]
    if which == "residual":
        wide = (name for name in names if model.get_submodule(name).weight.shape == (hidden,))
        names = [name for name in wide if not is_inside_attention(name)]
    return names


def is_norm(name: str, module: nn.Module) -> bool:
    """True for a normalisation layer: by its class or the last part of its name, with one weight a channel."""
    weight = getattr(module, "weight", None)
    is_named = "norm" in type(module).__name__.lower() or "norm" in name.rpartition(".")[2].lower()
    return is_named and isinstance(weight, nn.Parameter) and weight.ndim == 1


def is_inside_attention(name: str) -> bool:
    """True for the full name of a module that is in an attention module (one next to it may name attention too)."""
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def embedding_module(model: Any) -> str:
    """Return the full name of the input embedding."""
    embedding = model.get_input_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is embedding)
    return name


def make_trainable(model: Any, config: FinetuneConfig, base_name: str) -> tuple[Any, Trainable]:
    """Freeze and adapt `model` as `config.tuning` says; returns (the model to train, what is trained).

    Embeddings and norms are PEFT `modules_to_save`, so one adapter file holds all that was trained; tied embeddings
    stay tied. Trained parameters are float32 whatever the frozen ones are.

    Raises:
        ConfigError: unknown tuning, or LoRA targets that match no linear layer or an embedding that is trained whole.
    """
    tuning = TUNINGS[config.tuning]
    if not tuning.lora:
        model.requires_grad_(False)  # a vision tower stays as it is: several processes wait for every trained gradient
        for part in (decoder_of(model), model.get_output_embeddings()):
            part.requires_grad_(True)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        return model, describe_trainable(model, config.tuning)
    from peft import LoraConfig, get_peft_model

    targets = list(config.lora_targets or attention_projections(model))
    _check_targets(model, targets)
    linears = language_linears(model)
    if any(isinstance(m, nn.Linear) and _leaf(n) in targets and n not in linears for n, m in model.named_modules()):
        targets = [name for name in linears if _leaf(name) in targets]  # full names leave a vision tower out
    head = next((name for name, m in linears.items() if m is model.get_output_embeddings()), "")
    if tuning.embeddings and is_tied(model) and {head, _leaf(head)} & set(targets):
        raise ConfigError(
            f"LoRA target '{_leaf(head)}' is the embedding of this model too, which --tuning {config.tuning} "
            "trains whole: leave it out, or use --tuning lora or lora+norm."
        )
    saved = [embedding_module(model)] if tuning.embeddings else []
    saved += norm_modules(model, config.norms) if tuning.norms else []
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        ensure_weight_tying=tuning.embeddings and is_tied(model),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted, describe_trainable(adapted, config.tuning)


def _check_targets(model: Any, targets: list[str]) -> None:
    linear = sorted({_leaf(name) for name in language_linears(model)})
    unknown = [target for target in targets if target not in linear]
    if unknown or not targets:
        raise ConfigError(f"LoRA targets {unknown or targets} are no linear layers of this model: choose of {linear}.")


def describe_trainable(model: Any, tuning: str) -> Trainable:
    """Count the trained parameters by kind: lora, embeddings, norms, other (tied weights once)."""
    kinds: dict[str, int] = {}
    modules: dict[str, None] = {}
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() if not _is_quantised(parameter) else 2 * parameter.numel()
        if ".modules_to_save." not in name:  # a copy of a module that is counted as `original_module`
            total += size
        if parameter.requires_grad:
            kind = _kind_of(name)
            kinds[kind] = kinds.get(kind, 0) + size
            modules[_short_name(name)] = None
    return Trainable(tuning, total, sum(kinds.values()), kinds, list(modules))


def _is_quantised(parameter: torch.Tensor) -> bool:
    return type(parameter).__name__ == "Params4bit"  # two weights to a byte


def _kind_of(name: str) -> str:
    if "lora_" in name:
        return "lora"
    if "embed" in name or "lm_head" in name:
        return "embeddings"
    return "norms" if "norm" in name.lower() else "other"


def _short_name(name: str) -> str:
    """Name a module once for all layers."""
    parts = [part for part in name.split(".") if part not in ("base_model", "model", "default", "modules_to_save")]
    parts = ["*" if part.isdigit() else part for part in parts if not part.startswith("lora_")]
    return ".".join(parts[:-1] if parts and parts[-1] in ("weight", "bias") else parts)


def quantisation(name: str) -> Any:
    """Return the BitsAndBytesConfig for `--quantize nf4` (QLoRA, arXiv 2305.14314), or None for "none".

    Raises:
        ConfigError: unknown name.
        MissingExtraError: bitsandbytes is not installed.
    """
    if name == "none":
        return None
    if name != "nf4":
        raise ConfigError(f"--quantize must be none or nf4, got '{name}'.")
    require("--quantize nf4", ["qlora"])
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
