"""Settings of `finetune`, and those that every training run shares."""

from __future__ import annotations

from dataclasses import dataclass

from longext.options import DataConfig, RopeConfig, RuntimeConfig
from longext.rope.spec import extension_methods
from longext.settings import LENGTH, MANY, option, setting


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RuntimeConfig):
    """What every training run shares: steps, optimiser, memory, checkpoints, processes."""

    num_steps: int = option(1000, "Optimiser steps.", ge=1)
    batch_size: int = option(1, "Rows per process and forward pass.", ge=1, le=MANY)
    accumulation: int = option(8, "Forward passes per step.", ge=1)
    learning_rate: float = option(2e-05, "Peak learning rate.")
    schedule: str = setting("constant")
    warmup_steps: int = setting(20, ge=0)
    weight_decay: float = setting(0.0, ge=0)
    max_grad_norm: float = setting(1.0)
    checkpointing: bool = setting(True)
    offload: bool = option(False, "Keep checkpointed activations in CPU memory.")
    loss_chunk: int = setting(4096, ge=1)
    eval_data: str | None = option(None, "Documents to measure perplexity on.", panel="Data")
    eval_split: str = setting("validation")
    eval_lengths: tuple[int, ...] = option((), "Lengths to measure (default: trained length to target).")
    eval_documents: int = setting(8, ge=1)
    eval_every: int | None = option(None, "Steps between measurements (default: start and end).", ge=1)
    log_every: int = setting(1, ge=1)
    save_every: int | None = option(100, "Steps between checkpoints.", ge=1)
    keep_checkpoints: int = setting(2, ge=1, le=MANY)
    resume: bool = option(False, "Go on from the last checkpoint of this run.", panel="Output")
    report_to: str = option("none", "none, tensorboard or wandb.")
    control_tokens: str = setting("keep")
    num_processes: int = option(1, "Processes on this machine (one per GPU).", ge=1, le=2**16)
    sequence_parallel: int = option(1, "Processes that share each row (Ulysses).", ge=1, le=2**16)
    context_parallel: int = option(1, "accelerate's, instead: CUDA, FSDP2, full attention.", ge=1, le=2**16)
    collective_timeout: int = setting(1800, ge=1)
    stop_grace: int = setting(600, ge=0)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig, DataConfig, RopeConfig):
    """`longext finetune`: extend a checkpoint and train it at the new length (LongLoRA)."""

    data: str = option("", "Required: text file, folder, .jsonl, .parquet, Hub dataset id, or sample.", panel="Data")
    split: str = option("train", "Split of a Hub dataset.", panel="Data")
    attention: str | None = option(
        None, "In training: s2 (default; pose: full), full, short, s2-wrapped.", panel="Running"
    )
    method: str = option(
        "none", "RoPE method (none: train the RoPE the model has).", names=extension_methods, panel="Method"
    )
    task: str = option("pretrain", "pretrain (plain text) or sft (instructions, chats).")
    prompt: str = option("auto", "sft: auto (chat template, else plain), chat, plain, llama2.")
    window: int | None = option(None, "pose: row length in tokens.", ge=2, le=LENGTH)
    positions: str = option("plain", "plain, or pose (skip-wise, with --window).")
    separate_documents: bool = option(False, "No attention across packed documents.")
    tuning: str = option("lora+embed+norm", "lora+embed+norm, lora, lora+embed, lora+norm, full.")
    norms: str = setting("all")
    lora_r: int = option(8, "LoRA rank.", ge=1, le=2**16)
    lora_alpha: int = option(16, "LoRA alpha.", ge=1)
    lora_dropout: float = setting(0.0)
    lora_targets: tuple[str, ...] | None = setting(None)
    quantize: str = option("none", "none, or nf4 (QLoRA; needs bitsandbytes).")
    save_dtype: str = setting("auto")
    group_size: int | None = option(None, "S2-Attn group in tokens (default: a quarter row).", ge=2)
    group_ratio: float = option(0.25, "S2-Attn group as a share of the row.")
    backend: str = option("auto", "Attention kernel: auto, flash, sdpa, eager.")
