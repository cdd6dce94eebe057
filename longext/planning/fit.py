"""From a config to a plan: does the run fit, how long does it take, how long can it get, what does each flag buy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.checkpoint.source import resolve_model
from longext.errors import ConfigError
from longext.manifest import result_record
from longext.planning.config import DTYPES, PlanConfig
from longext.planning.devices import GIB, Device, parse_gpus
from longext.planning.flops import Flops, TrainingFlops, forward_flops, training_flops
from longext.planning.memory import MemoryPlan, kv_cache_bytes, plan_memory
from longext.planning.setup import TrainingSetup, setup_of
from longext.planning.shape import ModelShape, read_shape

STEP = 256  # lengths are searched in multiples of this many tokens
LONGEST = 2**24


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder: the flags so far, and what they make of the run.

    Attributes:
        flag: what this rung adds.
        needed: bytes a GPU must have at the asked length.
        fits: the device has them.
        longest: the longest length that fits, 0 if none does.
        seconds: of one micro-batch at the asked length.
    """

    flag: str
    setup: TrainingSetup
    needed: float
    fits: bool
    longest: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training run will cost.

    Attributes:
        source: directory of the model.
        setup: the run, sharding decided.
        dense, sparse: forward FLOPs of one sequence, every query counted with every key of its group; `sparse` is the
            run's own attention, equal to `dense` for full attention.
        flops: of one micro-batch as the hardware computes it (causal pairs, recomputation, backward).
        seconds: of one micro-batch (all GPUs at work) at the assumed utilisation.
        longest: the longest length that fits with these flags, 0 if none does.
        by_length: memory at lengths from short to beyond the longest, sharding decided for each.
    """

    config: PlanConfig
    source: Path
    shape: ModelShape
    setup: TrainingSetup
    device: Device
    memory: MemoryPlan
    dense: Flops
    sparse: Flops
    flops: TrainingFlops
    seconds: float
    longest: int
    ladder: tuple[Rung, ...]
    by_length: tuple[tuple[TrainingSetup, MemoryPlan], ...]

    @property
    def fits(self) -> bool:
        """True if the peak and the CUDA context are within the device's memory."""
        return self.memory.needed <= self.device.memory

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on by all GPUs together in a second."""
        return self.setup.sequences_at_once * self.setup.length / self.seconds

    @property
    def way_out(self) -> Rung | None:
        """The first rung of the ladder that fits, or None."""
        return next((rung for rung in self.ladder if rung.fits), None)

    def hours(self, num_tokens: int) -> float:
        """Return the hours that `num_tokens` tokens take on all GPUs together."""
        return num_tokens / self.tokens_per_second / 3600

    def notes(self) -> list[str]:
        """Return what a reader must know besides the numbers, one line each."""
        return [*_model_notes(self.shape), *_run_notes(self)]


def plan_training(config: PlanConfig) -> TrainingPlan:
    """Return the plan of `config`; reads config.json and the headers of weights, runs nothing.

    Raises:
        ConfigError: an unknown GPU, method, attention, sharding or dtype, or numbers that cannot be.
        CheckpointError: no such model, or one whose cost is not known.
    """
    _check_numbers(config)
    num_gpus, device = parse_gpus(config.gpus)
    wanted = setup_of(config, num_gpus)
    source = resolve_model(config.model, config.revision, weights=False)
    shape = read_shape(source)
    if shape.num_heads % wanted.sequence_parallel:
        raise ConfigError(
            f"`sequence_parallel` {wanted.sequence_parallel} must divide the model's {shape.num_heads} attention heads."
        )
    setup = decide_sharding(shape, wanted, device)
    longest = longest_length(shape, wanted, device)
    return TrainingPlan(
        config=config,
        source=source,
        shape=shape,
        setup=setup,
        device=device,
        memory=plan_memory(shape, setup),
        dense=forward_flops(shape, setup.length, causal=False),
        sparse=forward_flops(shape, setup.length, setup.group, causal=False),
        flops=training_flops(shape, setup, causal=True),
        seconds=seconds_of(shape, setup, device, config.utilisation),
        longest=longest,
        ladder=tuple(_ladder(config, shape, wanted, device)),
        by_length=tuple(_by_length(shape, wanted, device, longest)),
    )


def _check_numbers(config: PlanConfig) -> None:
    for name in ("length", "batch_size", "lora_r", "loss_chunk", "sequence_parallel"):
        if getattr(config, name) < 1:
            raise ConfigError(f"`{name}` must be >= 1, got {getattr(config, name)}.")
    if not 0 < config.utilisation <= 1:
        raise ConfigError(f"`utilisation` is a fraction of the peak, in (0, 1], got {config.utilisation:g}.")


def decide_sharding(shape: ModelShape, setup: TrainingSetup, device: Device) -> TrainingSetup:
    """Return `setup` with "auto" replaced: none on one GPU, else the first of ddp, zero2, fsdp that fits."""
    if setup.sharding != "auto":
        return setup
    if setup.num_gpus == 1:
        return dataclasses.replace(setup, sharding="none")
    choices = [dataclasses.replace(setup, sharding=name) for name in ("ddp", "zero2", "fsdp")]
    fitting = (choice for choice in choices if plan_memory(shape, choice).needed <= device.memory)
    return next(fitting, choices[-1])


def seconds_of(shape: ModelShape, setup: TrainingSetup, device: Device, utilisation: float) -> float:
    """Return the seconds of one micro-batch: its FLOPs over what the GPUs that share a sequence reach.

    Communication, offloading and the update are taken to hide behind computation; float32 runs at half the 16-bit peak
    (TF32).
    """
    rate = device.tflops * 1e12 * utilisation * (1.0 if setup.compute_bytes < 4 else 0.5)
    return training_flops(shape, setup, causal=True).total.total / (rate * setup.sequence_parallel)


def longest_length(shape: ModelShape, setup: TrainingSetup, device: Device) -> int:
    """Return the longest length (a multiple of 256 tokens) that fits with the flags of `setup`, 0 if none does."""

    def fits(length: int) -> bool:
        candidate = decide_sharding(shape, dataclasses.replace(setup, length=length), device)
        return plan_memory(shape, candidate).needed <= device.memory

    low, high = 0, LONGEST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle - 1)
    return low * STEP


def _ladder(config: PlanConfig, shape: ModelShape, wanted: TrainingSetup, device: Device) -> Iterator[Rung]:
    """Yield the rungs from everything off to everything on; each keeps the flags below it."""
    plain = "ddp" if wanted.num_gpus > 1 else "none"
    setup = dataclasses.replace(
        wanted,
        method="full",
        attention="full",
        checkpointing=False,
        loss_chunk=None,
        offload=False,
        sharding=plain,
        sequence_parallel=1,
    )
    for flag, change in (("full fine-tuning, full attention, no savings", {}), *_savings(config, shape, wanted)):
        setup = dataclasses.replace(setup, **change)
        needed = plan_memory(shape, setup).needed
        yield Rung(
            flag=flag,
            setup=setup,
            needed=needed,
            fits=needed <= device.memory,
            longest=longest_length(shape, setup, device),
            seconds=seconds_of(shape, setup, device, config.utilisation),
        )


def _savings(config: PlanConfig, shape: ModelShape, wanted: TrainingSetup) -> list[tuple[str, dict[str, Any]]]:
    """Return (flag, change) of each rung above the first; LoRA first, or last if full training was asked for."""
    method = "longlora" if wanted.is_full else wanted.method
    attention = "s2" if wanted.is_full else wanted.attention
    name = {"longlora": "--tuning lora+embed+norm --attention s2", "lora": "--tuning lora"}[method]
    lora: tuple[str, dict[str, Any]] = (name, {"method": method, "attention": attention})
    rungs: list[tuple[str, dict[str, Any]]] = [
        ("+ gradient checkpointing", {"checkpointing": True}),
        (f"+ loss in chunks of {config.loss_chunk:,} tokens", {"loss_chunk": config.loss_chunk}),
    ]
    if wanted.num_gpus > 1:
        rungs += [("+ DeepSpeed ZeRO-2", {"sharding": "zero2"}), ("+ FSDP2", {"sharding": "fsdp"})]
        ranks = math.gcd(wanted.num_gpus, shape.num_heads)
        if ranks > 1:
            rungs.append((f"+ --sequence-parallel {ranks}", {"sequence_parallel": ranks}))
    rungs.append(("+ --offload", {"offload": True}))
    return [*rungs, lora] if wanted.is_full else [lora, *rungs]


def _by_length(
    shape: ModelShape, wanted: TrainingSetup, device: Device, longest: int
) -> Iterator[tuple[TrainingSetup, MemoryPlan]]:
    """Yield (setup, memory): three halvings of the asked length, it, and doublings until it no longer fits."""
    length = max(STEP, wanted.length >> 3)
    while True:
        setup = decide_sharding(shape, dataclasses.replace(wanted, length=length), device)
        yield setup, plan_memory(shape, setup)
        if length >= wanted.length and (length > longest or length >= 8 * wanted.length):
            return
        length *= 2


def _model_notes(shape: ModelShape) -> Iterator[str]:
    if shape.counted is not None and shape.counted != shape.num_parameters:
        yield (
            f"the weight files hold {shape.counted:,} parameters, config.json describes {shape.num_parameters:,}: "
            "the plan is for the latter"
        )
    if shape.has_sliding_layers:
        yield "sliding-window layers are counted as full attention, an upper bound of time"
    if shape.caps_scores:
        yield "this family caps attention scores: a kernel without that cap holds them in memory, which is not planned"


def _run_notes(plan: TrainingPlan) -> Iterator[str]:
    setup, device = plan.setup, plan.device
    if not device.has_bfloat16 and setup.compute_bytes < 4:
        yield f"{device.name} has no bfloat16 matrix units, and training in float16 is not offered: use --dtype float32"
    if setup.sequence_parallel > 1 and setup.length % setup.sequence_parallel:
        yield f"the length must be a multiple of --sequence-parallel {setup.sequence_parallel}"
    if plan.memory.host:
        yield f"--offload needs {plan.memory.host / GIB:.1f} GiB of pinned host memory for each GPU"
    if plan.fits:
        return
    way = plan.way_out
    if way is None:
        yield "nothing on the ladder fits: more or larger GPUs, a smaller model or a shorter length"
    else:
        yield f"does not fit as asked; the first rung of the ladder that does: {way.flag} (with all rungs above it)"


_SIZES = (
    "model_type", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
    "vocab_size", "tied", "num_parameters", "counted",
)  # fmt: skip


def plan_record(plan: TrainingPlan) -> dict[str, Any]:
    """Return the plan as JSON values: bytes, FLOPs, seconds."""
    num_tokens = plan.config.num_tokens
    flops = {
        "forward_dense": plan.dense,
        "forward": plan.sparse,
        "step_forward": plan.flops.forward,
        "step_recompute": plan.flops.recompute,
        "step_backward": plan.flops.backward,
        "step": plan.flops.total,
    }
    return result_record(
        "plan",
        model=plan.config.model,
        shape={name: getattr(plan.shape, name) for name in _SIZES},
        setup={**dataclasses.asdict(plan.setup), "group": plan.setup.group},
        device=dataclasses.asdict(plan.device),
        trainable_parameters=plan.setup.trainable(plan.shape),
        memory=_memory_record(plan.memory),
        fits=plan.fits,
        longest_length=plan.longest,
        flops={
            name: {**dataclasses.asdict(part), "total": part.total, "attention_share": part.attention_share}
            for name, part in flops.items()
        },
        utilisation=plan.config.utilisation,
        seconds_per_batch=plan.seconds,
        tokens_per_second=plan.tokens_per_second,
        hours=plan.hours(num_tokens) if num_tokens else None,
        kv_cache_bytes=kv_cache_bytes(plan.shape, plan.setup.length, DTYPES[plan.config.dtype]),
        ladder=[dataclasses.asdict(rung) for rung in plan.ladder],
        by_length=[
            {"length": setup.length, "sharding": setup.sharding, **_memory_record(memory)}
            for setup, memory in plan.by_length
        ],
        notes=plan.notes(),
    )


def _memory_record(memory: MemoryPlan) -> dict[str, Any]:
    return {name: getattr(memory, name) for name in ("peak", "needed", "host", "phase", "parts")}
