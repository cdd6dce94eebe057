"""Settings of `plan`."""

from __future__ import annotations

from dataclasses import dataclass

from longext.options import RuntimeConfig
from longext.planning.builtin import BUILT_IN
from longext.settings import LENGTH, MANY, option, override

METHODS = ("longlora", "lora", "full")
ATTENTIONS = ("s2", "full")
SHARDINGS = ("auto", "none", "ddp", "zero2", "fsdp")
KERNELS = ("auto", "liger", "compile", "none")
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes
_MEMORY, _MACHINE = "Memory and speed", "Machine"


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """`longext plan`: memory, time and money of a training run before it is paid for, for each way to do it."""

    model: str = override(
        RuntimeConfig, "model", help=f"Directory, Hub id, books-5m (bundled), or a size: {', '.join(BUILT_IN)}."
    )
    length: int = option(help="Tokens of a training sequence.", ge=1, le=LENGTH)
    gpus: str = option("1xH100-80GB", "Number and kind, for example 8xA100-80GB.", panel=_MACHINE)
    host_memory: float | None = option(
        None, "Memory of the machine, GiB (default: 128 for each GPU).", ge=0, panel=_MACHINE
    )
    disk: float | None = option(None, "Free disk, GiB (default: enough).", ge=0, panel=_MACHINE)
    price_per_hour: float | None = option(None, "USD for an hour of one GPU.", ge=0, panel=_MACHINE)
    method: str = option("longlora", "What is trained", names=lambda: METHODS, panel="Method")
    attention: str | None = option(
        None, "Default: s2 for longlora, else full", names=lambda: ATTENTIONS, panel="Method"
    )
    batch_size: int = option(1, "Sequences per GPU at once.", ge=1, le=MANY)
    lora_r: int = option(8, "Rank of the adapters on q, k, v, o.", ge=1, le=2**16)
    group_ratio: float = option(0.25, "S2 group as a fraction of the length.", panel="Method")
    group_size: int | None = option(None, "S2 group in tokens, instead of --group-ratio.", ge=2, panel="Method")
    checkpointing: bool = option(
        True, "Compute each layer again in the backward pass.", "--checkpointing", "--no-checkpointing", panel=_MEMORY
    )
    checkpoint_every: int = option(1, "Checkpoint every N-th layer only.", ge=1, le=MANY, panel=_MEMORY)
    nested: int = option(1, "Keep one hidden state per N layers.", ge=1, le=MANY, panel=_MEMORY)
    offload: bool = option(False, "Keep layer inputs in host memory.", panel=_MEMORY)
    sweep: str = option("off", "Tokens of a row at once, a multiple of the S2 group; or auto, off.", panel=_MEMORY)
    kv_memory: float | None = option(
        None, "Full attention swept: GiB of keys and values on the GPU (default: half of what is free).", ge=0,
        panel=_MEMORY,
    )  # fmt: skip
    tile: int | None = option(None, "Tokens that the MLP and the norms work on at once.", ge=1, panel=_MEMORY)
    kernels: str = option(
        "auto", "Fused kernels (auto and compile count as none)", names=lambda: KERNELS, panel=_MEMORY
    )
    loss_chunk: int | None = option(
        None, "Tokens whose logits exist at once (default: as many as 512 MiB hold, 128 to 4,096).", ge=1, panel=_MEMORY
    )
    sharding: str = option("auto", "auto takes the first that fits", names=lambda: SHARDINGS)
    sequence_parallel: int = option(1, "GPUs that share each sequence.", ge=1, le=2**16)
    dtype: str = option("bfloat16", "Of weights and activations", names=lambda: DTYPES, panel="Running")
    utilisation: float | None = option(
        None, "Fraction of the GPU's peak that is reached, instead of the model of time.", le=1.0, panel=_MACHINE
    )
    num_tokens: int | None = option(None, "Tokens of the whole run, for its duration and price.", ge=1)
    probe: bool = option(False, "Measure two steps on this machine and calibrate.")
    revision: str | None = override(RuntimeConfig, "revision")
    output: str | None = option(None, "Results directory (default: none is written).", "--output", "-o", panel="Output")
    force: bool = override(RuntimeConfig, "force")
