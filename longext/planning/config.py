"""Settings of `plan`."""

from __future__ import annotations

from dataclasses import dataclass

from longext.options import RuntimeConfig
from longext.settings import LENGTH, MANY, option, override

METHODS = ("longlora", "lora", "full")
ATTENTIONS = ("s2", "full")
SHARDINGS = ("auto", "none", "ddp", "zero2", "fsdp")
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """`longext plan`: memory, FLOPs and time of a training run before it is paid for."""

    model: str = override(RuntimeConfig, "model")
    length: int = option(help="Tokens of a training sequence.", ge=1, le=LENGTH)
    gpus: str = option("1xH100-80GB", "Number and kind, for example 8xA100-80GB.")
    method: str = option("longlora", "What is trained", names=lambda: METHODS, panel="Method")
    attention: str | None = option(
        None, "Default: s2 for longlora, else full", names=lambda: ATTENTIONS, panel="Method"
    )
    batch_size: int = option(1, "Sequences per GPU at once.", ge=1, le=MANY)
    lora_r: int = option(8, "Rank of the adapters on q, k, v, o.", ge=1, le=2**16)
    group_ratio: float = option(0.25, "S2 group as a fraction of the length.")
    group_size: int | None = option(None, "S2 group in tokens, instead of --group-ratio.", ge=2)
    checkpointing: bool = option(
        True, "Compute each layer again in the backward pass.", "--checkpointing", "--no-checkpointing"
    )
    offload: bool = option(False, "Keep layer inputs in host memory.")
    loss_chunk: int = option(4096, "Tokens whose logits exist at once (>= length: all).", ge=1)
    sharding: str = option("auto", "auto takes the first that fits", names=lambda: SHARDINGS)
    sequence_parallel: int = option(1, "GPUs that share each sequence.", ge=1, le=2**16)
    dtype: str = option("bfloat16", "Of weights and activations", names=lambda: DTYPES, panel="Running")
    utilisation: float = option(0.45, "Fraction of the GPU's peak that is reached.", le=1.0)
    num_tokens: int | None = option(None, "Tokens of the whole run, for its duration.", ge=1)
    probe: bool = option(False, "Measure two steps on this machine and calibrate.")
    revision: str | None = override(RuntimeConfig, "revision")
    output: str | None = option(None, "Results directory (default: none is written).", "--output", "-o", panel="Output")
    force: bool = override(RuntimeConfig, "force")
