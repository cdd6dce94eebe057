"""Small models as `finetune` trains them, and the bytes of a step of theirs."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from longext.planning.setup import TrainingSetup
from longext.planning.tracker import MemoryTracker
from longext.training.loading import enable_checkpointing, narrow_hidden_states
from longext.training.tuning import norm_modules

LENGTH = 512
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 352,
    "vocab_size": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2}, SPLIT),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 40}, SPLIT),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 32}, SPLIT),
    "phi3": ("Phi3", {"num_key_value_heads": 2}, ("qkv_proj", "o_proj")),
    "gpt_neox": ("GPTNeoX", {}, ("query_key_value", "attention.dense")),
}


def build(config, targets, method: str, checkpointing: bool, mixed: bool, prepare=None, **layers):
    """Return a model in train mode; `prepare` gets it before PEFT does, `layers` go to `enable_checkpointing`."""
    dtype = torch.bfloat16 if mixed and method != "full" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if checkpointing:
        enable_checkpointing(model, False, **layers)
    narrow_hidden_states(model)
    if prepare:
        prepare(model)
    if method == "full":
        return model
    model.enable_input_require_grads()
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    saved = [embedding, *norm_modules(model)] if method == "longlora" else None
    lora = LoraConfig(r=8, target_modules=list(targets), modules_to_save=saved, ensure_weight_tying=False)
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def peak_of_a_step(model, mixed: bool, length: int) -> int:
    """Bytes of all activations at the peak of a step whose gradients exist already."""
    ids = torch.randint(0, model.config.vocab_size, (1, length))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    return peak_of(step, model)


def peak_of(step, model, known=()) -> int:
    """Bytes of all storages that a step makes and has at once; run once before, so that gradients exist.

    Parameters, gradients and `known` tensors are left out.
    """
    step()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with MemoryTracker([*model.parameters(), *model.buffers(), *gradients, *known]) as tracker:
        step()
    return tracker.peak


def setup_for(method: str, mixed: bool, checkpointing: bool, length: int = LENGTH) -> TrainingSetup:
    return TrainingSetup(
        length=length,
        method=method,
        attention="full",
        checkpointing=checkpointing,
        loss_chunk=None,
        compute_bytes=2 if mixed else 4,
    )
