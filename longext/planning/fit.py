"""From a config to a plan: does the run fit, what does it cost, how long can rows get, and in which other ways."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.source import HUB_ID, resolve_model
from longext.errors import CheckpointError, ConfigError
from longext.manifest import result_record
from longext.planning.builtin import BUILT_IN
from longext.planning.config import DTYPES, PlanConfig
from longext.planning.devices import GIB, Device, parse_gpus
from longext.planning.flops import Flops, TrainingFlops, forward_flops, training_flops
from longext.planning.memory import MemoryPlan, kv_cache_bytes
from longext.planning.setup import TrainingSetup, setup_of
from longext.planning.shape import ModelShape, read_shape, shape_of
from longext.planning.ways import STEP, Cost, Machine, Way, cost_of, longest_length, ways_for
from longext.registry import did_you_mean

_HOST = 128 * GIB  # of a machine that is rented with one GPU
LIMITS = {"GPU": "GPU memory", "host": "host memory", "disk": "disk", "time": "nothing but time"}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training run will cost.

    Attributes:
        source: directory of the model, None for a built-in size.
        cost: of the run as asked; its setup has the sharding decided.
        dense, sparse: forward FLOPs of one sequence, every query counted with every key of its group; `sparse` is the
            run's own attention, equal to `dense` for full attention.
        flops: of one micro-batch as the hardware computes it (causal pairs, recomputation, backward).
        longest: the longest length that fits with these flags, 0 if none does.
        ways: how else rows of this length can be trained, the run as asked among them.
        by_length: cost at lengths from short to beyond the longest.
    """

    config: PlanConfig
    source: Path | None
    shape: ModelShape
    machine: Machine
    cost: Cost
    dense: Flops
    sparse: Flops
    flops: TrainingFlops
    longest: int
    ways: tuple[Way, ...]
    by_length: tuple[Cost, ...]

    @property
    def setup(self) -> TrainingSetup:
        """The run as asked, sharding decided."""
        return self.cost.setup

    @property
    def device(self) -> Device:
        """The kind of GPU."""
        return self.machine.device

    @property
    def memory(self) -> MemoryPlan:
        """Memory of one GPU."""
        return self.cost.memory

    @property
    def fits(self) -> bool:
        """True if GPU, host and disk have what the run needs."""
        return self.cost.fits

    @property
    def seconds(self) -> float:
        """Seconds of one micro-batch, all GPUs at work."""
        return self.cost.seconds.total

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on by all GPUs together in a second."""
        return self.cost.tokens_per_second

    @property
    def way_out(self) -> Way | None:
        """The first way that fits, or None."""
        return next((way for way in self.ways if way.cost.fits), None)

    def hours(self, num_tokens: int) -> float:
        """Return the hours that `num_tokens` tokens take on all GPUs together."""
        return hours_of(self.cost, num_tokens)

    def price(self, cost: Cost | None = None) -> float | None:
        """Return the USD of `num_tokens` tokens, or if that is not set of one micro-batch; None without a price."""
        if self.config.price_per_hour is None:
            return None
        cost = cost or self.cost
        hours = hours_of(cost, self.config.num_tokens or cost.setup.tokens_at_once)
        return hours * cost.setup.num_gpus * self.config.price_per_hour

    def verdict(self) -> str:
        """Return in one sentence whether the run fits, and if it does not, what would."""
        if self.fits:
            return "fits as asked"
        lacking = " and ".join(LIMITS[name] for name in self.cost.exceeded)
        way = self.way_out
        if way is None:
            return (
                f"does not fit ({lacking}), and no other way does: more or larger GPUs, a smaller model, shorter rows"
            )
        flags = f" ({way.flags})" if way.flags else ""
        return f"does not fit as asked ({lacking}); the first way that does: {way.name}{flags}"

    def notes(self) -> list[str]:
        """Return what a reader must know besides the numbers, one line each."""
        return [*_model_notes(self.shape), *_run_notes(self)]


def hours_of(cost: Cost, num_tokens: int) -> float:
    """Return the hours that `num_tokens` tokens take on all GPUs together."""
    return num_tokens / cost.tokens_per_second / 3600


def plan_training(config: PlanConfig) -> TrainingPlan:
    """Return the plan of `config`; reads config.json and the headers of weights, runs nothing.

    Raises:
        ConfigError: an unknown GPU, method, attention, sharding or dtype, or numbers that cannot be.
        CheckpointError: no such model, or one whose cost is not known.
    """
    _check_numbers(config)
    num_gpus, device = parse_gpus(config.gpus)
    source, shape = find_shape(config)
    wanted = setup_of(config, num_gpus, shape)
    disk = math.inf if config.disk is None else config.disk * GIB
    host = _HOST * num_gpus if config.host_memory is None else config.host_memory * GIB
    machine = Machine(device=device, host=host, disk=disk)
    cost, longest = cost_of(shape, wanted, machine, config.utilisation), longest_length(shape, wanted, machine)
    return TrainingPlan(
        config=config,
        source=source,
        shape=shape,
        machine=machine,
        cost=cost,
        dense=forward_flops(shape, wanted.length, causal=False),
        sparse=forward_flops(shape, wanted.length, wanted.group, causal=False),
        flops=training_flops(shape, cost.setup, causal=True),
        longest=longest,
        ways=tuple(ways_for(shape, wanted, machine, config.utilisation)),
        by_length=tuple(_by_length(shape, wanted, machine, longest)),
    )


def find_shape(config: PlanConfig) -> tuple[Path | None, ModelShape]:
    """Return (directory, shape) of the model: a directory, a Hub id, a bundled model or, without one, a built-in size.

    Raises:
        CheckpointError: none of these; names the nearest.
    """
    name = config.model
    if name in BUILT_IN and not Path(name).is_dir():
        return None, shape_of(BUILT_IN[name], Path(name))
    if name not in BUNDLED_MODELS and not Path(name).expanduser().exists() and not HUB_ID.match(name):
        known = [*BUNDLED_MODELS, *BUILT_IN]
        raise CheckpointError(f"No model at '{name}': not a directory or a known size. {did_you_mean(name, known)}")
    source = resolve_model(name, config.revision, weights=False)
    return source, read_shape(source)


def _check_numbers(config: PlanConfig) -> None:
    for name in ("length", "batch_size", "lora_r", "sequence_parallel", "checkpoint_every", "nested"):
        if getattr(config, name) < 1:
            raise ConfigError(f"`{name}` must be >= 1, got {getattr(config, name)}.")
    if config.utilisation is not None and not 0 < config.utilisation <= 1:
        raise ConfigError(f"`utilisation` is a fraction of the peak, in (0, 1], got {config.utilisation:g}.")


def _by_length(shape: ModelShape, wanted: TrainingSetup, machine: Machine, longest: int) -> Iterator[Cost]:
    """Yield the cost at three halvings of the asked length, at it, and at doublings until it no longer fits."""
    below = [wanted.length >> halvings for halvings in (3, 2, 1) if wanted.length >> halvings >= STEP]
    for length in (*below, *(wanted.length << doublings for doublings in range(4))):
        yield cost_of(shape, dataclasses.replace(wanted, length=length), machine)
        if length >= wanted.length and length > longest:
            return


def _model_notes(shape: ModelShape) -> Iterator[str]:
    if shape.counted is not None and shape.counted != shape.num_parameters:
        yield (
            f"the weight files hold {shape.counted:,} parameters, config.json describes {shape.num_parameters:,}: "
            "the plan is for the latter"
        )
    if shape.has_sliding_layers:
        yield "sliding-window layers are counted as full attention, an upper bound of time and of the KV cache"
    if shape.caps_scores:
        yield "this family caps attention scores: a kernel without that cap holds them in memory, which is not planned"


def _run_notes(plan: TrainingPlan) -> Iterator[str]:
    setup, device, seconds = plan.setup, plan.device, plan.cost.seconds
    if not device.has_bfloat16 and setup.compute_bytes < 4:
        yield f"{device.name} has no bfloat16 matrix units, and training in float16 is not offered: use --dtype float32"
    if setup.sequence_parallel > 1 and setup.length % setup.sequence_parallel:
        yield f"the length must be a multiple of --sequence-parallel {setup.sequence_parallel}"
    if plan.config.kernels == "auto" and setup.sharding in ("none", "ddp"):
        fused = dataclasses.replace(setup, kernels="liger")
        cost = cost_of(plan.shape, fused, plan.machine, plan.config.utilisation)
        yield (
            f"planned without fused kernels; --kernels liger, where it is installed, makes it "
            f"{cost.memory.needed / GIB:.1f} GiB a GPU and {cost.tokens_per_second:,.0f} tokens/s"
        )
    if plan.config.kernels == "compile":
        yield "what --kernels compile saves is not known: planned as without"
    if seconds.pinning > 1:
        yield f"the first step takes about {seconds.pinning:.0f} s longer: host memory is pinned"
    if seconds.transfers > seconds.compute or seconds.waiting > 0.5 * seconds.total:
        yield "the bus to host memory, not the GPU, sets the time of a step"


_SIZES = (
    "model_type", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
    "vocab_size", "tied", "num_parameters", "counted",
)  # fmt: skip


def plan_record(plan: TrainingPlan) -> dict[str, Any]:
    """Return the plan as JSON values: bytes, FLOPs, seconds, USD."""
    num_tokens = plan.config.num_tokens
    flops = {
        "forward_dense": plan.dense,
        "forward": plan.sparse,
        "step_forward": plan.flops.forward,
        "step_sweep": plan.flops.sweep,
        "step_recompute": plan.flops.recompute,
        "step_backward": plan.flops.backward,
        "step": plan.flops.total,
    }
    return result_record(
        "plan",
        model=plan.config.model,
        shape={name: getattr(plan.shape, name) for name in _SIZES},
        setup={**dataclasses.asdict(plan.setup), "group": plan.setup.group, "chunk": plan.setup.chunk},
        device=dataclasses.asdict(plan.device),
        host_memory=plan.machine.host,
        disk=None if plan.config.disk is None else plan.machine.disk,
        trainable_parameters=plan.setup.trainable(plan.shape),
        verdict=plan.verdict(),
        **_cost_record(plan, plan.cost),
        longest_length=plan.longest,
        flops={
            name: {**dataclasses.asdict(part), "total": part.total, "attention_share": part.attention_share}
            for name, part in flops.items()
            if part.total
        },
        utilisation=plan.config.utilisation,
        hours=plan.hours(num_tokens) if num_tokens else None,
        kv_cache_bytes=kv_cache_bytes(plan.shape, plan.setup.length, DTYPES[plan.config.dtype]),
        ways=[
            {
                "name": way.name,
                "flags": way.flags,
                "longest_length": way.longest,
                "limit": way.limit,
                "sharding": way.cost.setup.sharding,
                **_cost_record(plan, way.cost),
            }
            for way in plan.ways
        ],
        by_length=[
            {"length": cost.setup.length, "sharding": cost.setup.sharding, **_memory_record(cost.memory)}
            for cost in plan.by_length
        ],
        notes=plan.notes(),
    )


def _cost_record(plan: TrainingPlan, cost: Cost) -> dict[str, Any]:
    storage, seconds = cost.storage, cost.seconds
    return {
        "fits": cost.fits,
        "exceeded": list(cost.exceeded),
        "memory": _memory_record(cost.memory),
        "storage": {**dataclasses.asdict(storage), "host": storage.host, "disk": storage.disk},
        "seconds": dataclasses.asdict(seconds),
        "seconds_per_batch": seconds.total,
        "tokens_per_second": cost.tokens_per_second,
        "usd": plan.price(cost),
    }


def _memory_record(memory: MemoryPlan) -> dict[str, Any]:
    return {name: getattr(memory, name) for name in ("peak", "needed", "host", "phase", "parts")}
