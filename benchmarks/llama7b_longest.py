"""Longest context and speed of LongLoRA training on one GPU: a model of Llama-2-7B's shape with random weights.

Both columns train LoRA (r = 8 on q, k, v, o) in bfloat16 with activation checkpointing, batch 1: ours (S2-Attn, chunked
loss, embeddings and norms trained) against the stack a user would pick (transformers + peft + SDPA full attention +
its own loss). Lengths grow until each runs out of memory. Needs a CUDA device.

    python benchmarks/llama7b_longest.py [--lengths 8192,16384,32768,65536,98304,131072,196608,262144]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from typing import Any

import torch

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


def main() -> None:
    """Print one row per length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,16384,32768,65536,98304,131072,196608,262144")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Llama-2-7B shape, random weights\n")
    print("| tokens | longext tok/s | GiB | transformers + peft tok/s | GiB | ratio |")
    print("|--:|--:|--:|--:|--:|--:|")
    fits = {"longext": True, "plain": True}
    for length in map(int, arguments.lengths.split(",")):
        cells: dict[str, tuple[float, float] | None] = {}
        for kind in fits:
            cells[kind] = measure(kind, length) if fits[kind] else None
            fits[kind] = cells[kind] is not None
        ours, theirs = cells["longext"], cells["plain"]
        text = [f"{c[0]:,.0f} | {c[1]:.1f}" if c else "out of memory | -" for c in (ours, theirs)]
        ratio = f"{ours[0] / theirs[0]:.2f}" if ours and theirs else "-"
        print(f"| {length:,} | {text[0]} | {text[1]} | {ratio} |", flush=True)
        if not any(fits.values()):
            break


def measure(kind: str, length: int) -> tuple[float, float] | None:
    """Return (tokens per second, peak GiB) of a step after a first one, or None out of memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step = ours(length) if kind == "longext" else plain(length)
        step()
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return length / (time.perf_counter() - started), torch.cuda.max_memory_allocated() / 2**30
    except torch.OutOfMemoryError:
        return None


def build(implementation: str, length: int) -> Any:
    """Return the base model in bfloat16 on the GPU, its RoPE interpolated to `length`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": max(1.0, length / 4096)}
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": length}, rope_parameters=rope)
    config._attn_implementation = implementation
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model


def ours(length: int) -> Any:
    """Return a training step as `longext finetune` runs it."""
    from longext.attention.layout import Layout
    from longext.attention.shifted import PLAN, AttentionPlan, register_attention
    from longext.training.config import FinetuneConfig
    from longext.training.loading import enable_checkpointing, narrow_hidden_states
    from longext.training.losses import chunked_loss, shift
    from longext.training.tuning import make_trainable

    register_attention()
    model, _ = make_trainable(build("s2_attn", length), FinetuneConfig(model="llama2-7b-shape"), "llama2-7b-shape")
    base = model.get_base_model()
    narrow_hidden_states(base)
    enable_checkpointing(base, offload=False)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    ids = torch.randint(3, 32_000, (1, length), device="cuda")
    plan = AttentionPlan(Layout(1, length), length // 4)

    def step() -> None:
        with chunked_loss(base, 4096), torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, shift_labels=shift(ids), use_cache=False, **{PLAN: plan}).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def plain(length: int) -> Any:
    """Return a training step of transformers and peft alone: LoRA, SDPA, checkpointing, the model's own loss."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    base = build("sdpa", length)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model = get_peft_model(base, lora).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    ids = torch.randint(3, 32_000, (1, length), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


if __name__ == "__main__":
    main()
