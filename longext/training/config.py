"""Settings of `finetune`, and those that every training run shares."""

from __future__ import annotations

from dataclasses import dataclass

from longext.attention.bands import REMAPS, trainable_remaps
from longext.attention.variant import ATTENTION_VARIANTS
from longext.data.config import RowsConfig
from longext.options import RopeConfig, RuntimeConfig
from longext.registry import Registry
from longext.rope.spec import extension_methods
from longext.settings import LENGTH, MANY, option, override

DRY_RUN = {"dry_run": "Check everything, print the plan, train nothing."}
_TRAINING, _MEMORY, _CHECKPOINTS, _PROCESSES = "Training", "Memory and speed", "Checkpoints", "Processes"
_MOST_PROCESSES = 2**16
KERNELS = ("auto", "liger", "compile", "none")
PLAIN, LONGCE = "plain", "longce"


@dataclass(frozen=True)
class Tuning:
    """A choice of trainable parameters: LoRA adapters, embeddings, norms; without LoRA every weight."""

    lora: bool
    embeddings: bool
    norms: bool


TUNINGS: Registry[Tuning] = Registry("tuning")
TUNINGS.register("lora+embed+norm", Tuning(True, True, True), "LoRA, embeddings and norms (the paper's LoRA+)")
TUNINGS.register("lora", Tuning(True, False, False), "LoRA alone")
TUNINGS.register("lora+embed", Tuning(True, True, False), "LoRA and embeddings")
TUNINGS.register("lora+norm", Tuning(True, False, True), "LoRA and norms")
TUNINGS.register("full", Tuning(False, True, True), "every parameter")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RuntimeConfig):
    """What every training run shares: steps, optimiser, memory, checkpoints, processes."""

    device: str = override(RuntimeConfig, "device", help="auto, cpu, cuda or mps.")
    dtype: str = override(
        RuntimeConfig, "dtype", help="auto (float32 on a CPU, bfloat16 on a GPU), float32 or bfloat16."
    )
    seed: int = override(RuntimeConfig, "seed", help="Seed of data order and what is initialised.")
    output: str | None = override(RuntimeConfig, "output", help="Directory to write.")
    num_steps: int = option(1000, "Optimiser steps.", ge=1, panel=_TRAINING)
    batch_size: int = option(1, "Rows per process and forward pass.", ge=1, le=MANY, panel=_TRAINING)
    accumulation: int = option(8, "Forward passes per step.", ge=1, panel=_TRAINING)
    learning_rate: float = option(2e-5, "Peak learning rate.", panel=_TRAINING)
    schedule: str = option(
        "constant", "After the warm-up", names=lambda: ("constant", "linear", "cosine"), panel=_TRAINING
    )
    warmup_steps: int = option(20, "Steps of warm-up, at most half of all.", ge=0, panel=_TRAINING)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", ge=0, panel=_TRAINING)
    max_grad_norm: float = option(1.0, "Norm at which gradients are clipped.", panel=_TRAINING)
    checkpointing: bool = option(True, "Compute each layer again in the backward pass.", panel=_MEMORY)
    offload: bool = option(False, "Keep checkpointed activations in CPU memory.", panel=_MEMORY)
    loss_chunk: int | None = option(
        None, "Tokens whose logits exist at once (default: 512 MiB of them, 128 to 4096).", ge=1, panel=_MEMORY
    )
    eval_data: str | None = option(None, "Documents to measure perplexity on.", panel="Data")
    eval_split: str = option("validation", "Split of --eval-data, if a Hub dataset.", panel="Data")
    eval_lengths: tuple[int, ...] = option(
        (), "Lengths to measure (default: trained length to target).", ge=2, le=LENGTH, panel="Data"
    )
    eval_documents: int = option(8, "Documents of --eval-data to read.", ge=1, panel="Data")
    eval_every: int | None = option(None, "Steps between measurements (default: start and end).", ge=1, panel="Data")
    log_every: int = option(1, "Steps between lines of metrics.jsonl.", ge=1, panel="Output")
    save_every: int | None = option(100, "Steps between checkpoints.", ge=1, panel=_CHECKPOINTS)
    keep_checkpoints: int = option(2, "Checkpoints that are kept.", ge=1, le=MANY, panel=_CHECKPOINTS)
    resume: bool = option(False, "Go on from the last checkpoint of this run.", panel=_CHECKPOINTS)
    report_to: str = option("none", "none, tensorboard or wandb.", panel="Output")
    num_processes: int = option(
        1, "Processes on this machine (one per GPU).", ge=1, le=_MOST_PROCESSES, panel=_PROCESSES
    )
    sequence_parallel: int = option(
        1, "Processes that share each row (Ulysses).", ge=1, le=_MOST_PROCESSES, panel=_PROCESSES
    )
    context_parallel: int = option(
        1, "accelerate's, instead: CUDA, FSDP2, full attention.", ge=1, le=_MOST_PROCESSES, panel=_PROCESSES
    )
    collective_timeout: int = option(
        1800, "Seconds after which a process that does not answer ends the run.", ge=1, panel=_PROCESSES
    )
    stop_grace: int = option(600, "Seconds that processes have to save and stop.", ge=0, panel=_PROCESSES)


def _not_trained(method: str) -> str:
    if method.partition(":")[0] not in REMAPS:
        return ""
    return (
        f"--method {method} gives most tokens positions that training makes no better: train under "
        f"{' or '.join(trainable_remaps())}, whose distances the model has seen, or use it without training."
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig, RowsConfig, RopeConfig):
    """`longext finetune`: extend a checkpoint and train it at the new length (LongLoRA)."""

    target_length: int | None = override(RopeConfig, "target_length")
    method: str = option(
        "none",
        "RoPE method; none trains the RoPE the model has; dca and string remap positions inside attention",
        names=lambda: ("none", *extension_methods(), *trainable_remaps()),
        elsewhere=_not_trained,
        panel="Method",
    )
    window: int | None = option(None, "pose: row length in tokens.", ge=2, le=LENGTH, panel="Method")
    mixed_window: bool = option(
        False, "Documents up to the trained length keep the original RoPE, longer ones get the new.", panel="Method"
    )
    short_share: float | None = option(
        None, "mixed-window: share of rows cut to the trained length (default 0.3; sft: 0).", ge=0, le=1, panel="Method"
    )
    attention: str | None = option(
        None, "In training (default: s2; pose: full)", names=lambda: ATTENTION_VARIANTS, panel="Method"
    )
    group_size: int | None = option(None, "S2-Attn group in tokens (default: a quarter row).", ge=2, panel="Method")
    group_ratio: float = option(0.25, "S2-Attn group as a share of the row.", panel="Method")
    loss: str = option(
        PLAIN,
        "longce weighs each token by how much less its loss is with far text in view than without",
        names=lambda: (PLAIN, LONGCE),
        panel=_TRAINING,
    )
    short_context: int | None = option(
        None, "longce: tokens in view without far text (default: a quarter row, at most 4096).", ge=1, panel=_TRAINING
    )
    tuning: str = option("lora+embed+norm", "What is trained", names=lambda: TUNINGS, panel=_TRAINING)
    norms: str = option(
        "all", "Norms that are trained; residual leaves those of queries and keys", names=lambda: ("all", "residual"),
        panel=_TRAINING,
    )  # fmt: skip
    lora_r: int = option(8, "LoRA rank.", ge=1, le=2**16, panel=_TRAINING)
    lora_alpha: int = option(16, "LoRA alpha.", ge=1, panel=_TRAINING)
    lora_dropout: float = option(0.0, "LoRA dropout.", ge=0, panel=_TRAINING)
    lora_targets: tuple[str, ...] | None = option(
        None, "Linear layers with adapters (default: those of attention).", panel=_TRAINING
    )
    quantize: str = option(
        "none", "Frozen weights; nf4 is QLoRA and needs bitsandbytes", names=lambda: ("none", "nf4"), panel=_MEMORY
    )
    sweep: str = option(
        "off", "Tokens of a row whose graph is alive at once: a number, auto, or off for all.", panel=_MEMORY
    )
    kv_memory: float | None = option(
        None, "GiB of GPU memory for the keys and values of a sweep with full attention (default: half of the free).",
        ge=0, panel=_MEMORY,
    )  # fmt: skip
    backend: str = option("auto", "Attention kernel: auto, flash, sdpa, eager.", panel=_MEMORY)
    kernels: str = option(
        "auto", "Of norms, RoPE and MLPs; auto is liger where it can be used", names=lambda: KERNELS, panel=_MEMORY
    )
    tile: int | None = option(None, "Tokens that MLPs and norms take at once (default: all).", ge=1, panel=_MEMORY)
    checkpoint_every: int = option(
        1, "Compute one layer of so many again, and keep the others.", ge=1, le=MANY, panel=_MEMORY
    )
    nested: int = option(1, "Layers that keep one checkpoint between them.", ge=1, le=MANY, panel=_MEMORY)
    save_dtype: str = option(
        "auto", "Of a full checkpoint (auto: the base's)", names=lambda: ("auto", "float32", "bfloat16", "float16"),
        panel="Output",
    )  # fmt: skip
