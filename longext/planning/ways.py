"""Each way to train on rows of a length: what it needs of GPU, host and disk, its time, and which limit binds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longext.planning.devices import GIB, Device
from longext.planning.memory import MemoryPlan, carried_bytes, plan_memory
from longext.planning.seconds import StepSeconds, step_seconds
from longext.planning.setup import AUTO, SWEPT, TrainingSetup
from longext.planning.shape import ModelShape
from longext.planning.storage import Storage, plan_storage

STEP = 256  # lengths are searched in multiples of this many tokens
LONGEST = 2**24
NESTED = 6  # layers that share a hidden state: near the square root of the layers of models of 7B


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is.

    Attributes:
        host: bytes of host memory.
        disk: bytes of free disk, infinite if nothing is said.
    """

    device: Device
    host: float
    disk: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one setup costs on a machine.

    Attributes:
        setup: as planned: sharding decided, and where a sweep's keys and values are.
        exceeded: the limits that are too low, of GPU, host and disk.
    """

    setup: TrainingSetup
    memory: MemoryPlan
    storage: Storage
    seconds: StepSeconds
    exceeded: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True if no limit is too low."""
        return not self.exceeded

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on by all GPUs together in a second."""
        return self.setup.tokens_at_once / self.seconds.total


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to get a length.

    Attributes:
        name: what is done.
        flags: of `longext finetune`, besides model, data and length.
        cost: at the asked length.
        longest: the longest length that fits, 0 if none does.
        limit: what binds: what is too low at the asked length, or if it fits what ends a longer row; "time" if nothing
            does up to 16 million tokens.
    """

    name: str
    flags: str
    cost: Cost
    longest: int
    limit: str


def cost_of(shape: ModelShape, wanted: TrainingSetup, machine: Machine, utilisation: float | None = None) -> Cost:
    """Return what `wanted` costs; sharding "auto" and an open `kv_memory` are decided here."""
    setup = decide_sharding(shape, wanted, machine.device)
    memory, storage = plan_memory(shape, setup), plan_storage(shape, setup)
    uses = {
        "GPU": (memory.needed, machine.device.memory),
        "host": (storage.host, machine.host),
        "disk": (storage.disk, machine.disk),
    }
    return Cost(
        setup=setup,
        memory=memory,
        storage=storage,
        seconds=step_seconds(shape, setup, machine.device, utilisation),
        exceeded=tuple(name for name, (need, has) in uses.items() if need > has),
    )


def decide_sharding(shape: ModelShape, wanted: TrainingSetup, device: Device) -> TrainingSetup:
    """Return `wanted` with "auto" replaced: none on one GPU, else the first of ddp, zero2, fsdp that fits."""
    if wanted.sharding != "auto":
        return decide_place(shape, wanted, device)
    names = ("none",) if wanted.num_gpus == 1 else ("ddp", "zero2", "fsdp")
    choices = [decide_place(shape, dataclasses.replace(wanted, sharding=name), device) for name in names]
    fitting = (choice for choice in choices if plan_memory(shape, choice).needed <= device.memory)
    return next(fitting, choices[-1])


def decide_place(shape: ModelShape, setup: TrainingSetup, device: Device) -> TrainingSetup:
    """Return `setup` with the GiB that a sweep under full attention keeps on the GPU, by default half of the free."""
    if setup.chunk is None or setup.group is not None:
        return dataclasses.replace(setup, kv_memory=None)
    allowed = setup.kv_memory
    if allowed is None:
        on_host = dataclasses.replace(setup, kv_memory=0.0)
        allowed = max(0.0, device.memory - plan_memory(shape, on_host).needed) / 2 / GIB
    return dataclasses.replace(setup, kv_memory=min(allowed, carried_bytes(shape, setup) / GIB))


def longest_length(shape: ModelShape, wanted: TrainingSetup, machine: Machine) -> int:
    """Return the longest length (a multiple of 256 tokens) that fits with the flags of `wanted`, 0 if none does."""
    low, high = 0, LONGEST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = cost_of(shape, dataclasses.replace(wanted, length=middle * STEP), machine).fits
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * STEP


def ways_for(
    shape: ModelShape, asked: TrainingSetup, machine: Machine, utilisation: float | None = None
) -> Iterator[Way]:
    """Yield the ways to train, the run as asked among them; all have its kernels, tiles and batch."""
    plain = dataclasses.replace(
        asked, checkpointing=True, checkpoint_every=1, nested=1, offload=False, sweep=None, kv_memory=None,
        sequence_parallel=1,
    )  # fmt: skip
    rows = list(_ways(shape, asked, plain))
    if asked not in [setup for _, setup in rows]:
        rows.insert(0, ("as asked", asked))
    for name, setup in rows:
        cost = cost_of(shape, setup, machine, utilisation)
        longest = longest_length(shape, setup, machine)
        beyond = dataclasses.replace(setup, length=longest + STEP)
        limits = cost.exceeded or cost_of(shape, beyond, machine).exceeded if longest < LONGEST else ()
        yield Way(
            name=name,
            flags=flags_of(setup if setup.kv_memory is None else cost.setup),
            cost=cost,
            longest=longest,
            limit="+".join(limits) or "time",
        )


def _ways(shape: ModelShape, asked: TrainingSetup, plain: TrainingSetup) -> Iterator[tuple[str, TrainingSetup]]:
    def changed(**changes: Any) -> TrainingSetup:
        return dataclasses.replace(plain, **changes)

    yield "checkpointing", plain
    yield "+ offload", changed(offload=True)
    if shape.num_layers > NESTED:
        yield f"+ nested {NESTED}", changed(offload=True, nested=NESTED)
    yield from _sweeps(asked, plain)
    ranks = math.gcd(asked.num_gpus, shape.num_heads)
    if ranks > 1:
        yield f"{ranks} GPUs a row", changed(sequence_parallel=ranks)
        yield f"+ offload, {ranks} GPUs", changed(sequence_parallel=ranks, offload=True)
    if asked.is_full:
        group = {} if asked.attention == "full" else {"group_size": asked.group_size}
        yield "LoRA, checkpointing", changed(method="longlora", **group)


def _sweeps(asked: TrainingSetup, plain: TrainingSetup) -> Iterator[tuple[str, TrainingSetup]]:
    """Yield the sweeps of rows longer than a chunk; S2 in the asked groups, or of 8,192 if those grow with the row."""
    chunk = asked.sweep or AUTO
    group = asked.group_size or min(SWEPT, max(2, asked.length // 4 // 2 * 2))
    s2 = dataclasses.replace(plain, attention="s2", group_size=group, sweep=chunk)
    if s2.chunk is not None:
        yield f"S2 sweep, {group:,}", s2
    full = dataclasses.replace(plain, attention="full", group_size=None, sweep=chunk)
    if full.chunk is not None:
        yield "full sweep, GPU", dataclasses.replace(full, kv_memory=math.inf)
        yield "full sweep, host", dataclasses.replace(full, kv_memory=0.0)


def flags_of(setup: TrainingSetup) -> str:
    """Return the flags of `longext finetune` that make a run of this setup, those at their defaults left out."""
    tuning = {"longlora": "", "lora": "--tuning lora", "full": "--tuning full"}[setup.method]
    attention = "" if setup.attention == "s2" else "--attention full"
    group = "" if setup.attention != "s2" or setup.group_size is None else f"--group-size {setup.group_size}"
    sweep = "" if setup.sweep is None else f"--sweep {setup.sweep or 'auto'}"
    parts = [
        tuning,
        attention,
        group,
        f"--group-ratio {setup.group_ratio:g}" if not group and not attention and setup.group_ratio != 0.25 else "",
        "" if setup.checkpointing else "--no-checkpointing",
        f"--checkpoint-every {setup.checkpoint_every}" if setup.checkpoint_every > 1 else "",
        f"--nested {setup.nested}" if setup.nested > 1 else "",
        "--offload" if setup.offload else "",
        sweep,
        f"--kv-memory {math.ceil(setup.kv_memory)}" if setup.kv_memory is not None else "",
        f"--tile {setup.tile}" if setup.tile else "",
        "--kernels liger" if setup.has_fused_kernels else "",
        f"--num-processes {setup.num_gpus}" if setup.num_gpus > 1 else "",
        f"--sequence-parallel {setup.sequence_parallel}" if setup.sequence_parallel > 1 else "",
    ]
    return " ".join(part for part in parts if part)
