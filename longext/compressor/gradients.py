"""Gradients through a document's memories with one segment's graph alive, and the policies that weigh them.

Memories are leaves (keys and values after projection and rotation). No memory of an independent architecture depends on
another, so dJ/dm_s adds up over the readers t > s and is pulled back through segment s once:

    encode all s without a graph;  for each t: J_t.backward() into the leaves;  for each s: encode again, pull back.

For recurrent architectures the same holds in reverse order (t = T .. 1): at t, all readers of m_t have run.
Both equal autograd through one graph of the whole sweep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from longext.compressor.base import Compressor
from longext.compressor.memory import Memory, MemoryGradients, MemoryStore, join
from longext.compressor.policies import Policy
from longext.compressor.schedule import Schedule, kept_slots
from longext.compressor.segments import Segment
from longext.training.losses import IGNORED
from longext.training.sweep import Steps, run_sweep

if TYPE_CHECKING:
    from longext.compressor.policies import Weights


@dataclass
class Sweep:
    """B documents of T segments each, and where their memories go.

    Attributes:
        segments: in order.
        compressor: who reads and writes.
        scale: every loss is multiplied by it before its gradient is taken.
        at_once: segments of a pass without a graph before their gradients are taken; None for half as many as layers.
        fading: the ratios that memories are read at by distance, each written at the first; () as they were written.
        schedule: what each segment reads.
        visible: memories that each segment reads.
        slots: of each memory; the last segment has none.
    """

    segments: Sequence[Segment]
    compressor: Compressor
    scale: float = 1.0
    at_once: int | None = None
    fading: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        last, spec = self.segments[-1], self.compressor.spec
        # what stays readable is what the segments hold: none of it for auto-encoding
        spec = dataclasses.replace(spec, overlap=last.before.shape[1], sink=last.sink.shape[1])
        ratios = self.fading or [segment.ratio for segment in self.segments]
        self.schedule = Schedule.of(type(self.compressor), spec, ratios, by_distance=bool(self.fading))
        self.visible = [self.schedule.visible(t) for t in range(len(self.segments))]
        self.slots = [self.schedule.slots(t) for t in range(len(self.segments) - 1)]

    def new_store(self) -> MemoryStore:
        """Return an empty store with the sink's keys and values in front."""
        return MemoryStore(self.compressor.fixed(self.segments[-1].sink), self.slots)

    def is_scored(self, t: int) -> bool:
        """True if segment t has labels, and its loss depends on anything that is trained."""
        segment = self.segments[t]
        trained = self.compressor.trains_reader or self.visible[t] > 0 or bool((segment.tokens < 0).any())
        return trained and bool((segment.labels != IGNORED).any())

    def read(self, t: int, memory: Memory, *, write: bool = False) -> tuple[torch.Tensor, Memory | None]:
        """Return (loss of segment t, its memory if `write`); 0 if nothing trained is scored."""
        scored = self.is_scored(t)
        if not scored and not write:
            return self.zero, None
        memory = self._faded(t, memory) if t else ()  # segment 0 holds the sink itself
        loss, written = self.compressor.step(self.segments[t], memory, self.place(t), loss=scored, write=write)
        return self.zero if loss is None else loss, written

    def _faded(self, t: int, memory: Memory) -> Memory:
        """Return [sink | memories] at the ratios and positions that segment t reads them at; gradients flow through."""
        if not self.fading or not memory:
            return memory
        schedule, device = self.schedule, memory[0].device
        written = [schedule.written_at(s) for s in range(*schedule.span(t))]
        kept = torch.tensor(kept_slots(schedule.segment, written, schedule.ratios_at(t)), dtype=torch.int64)
        turns = torch.cat([torch.zeros(schedule.fixed, dtype=torch.int64), torch.arange(len(kept)) - kept])
        places = torch.cat([torch.arange(schedule.fixed), schedule.fixed + kept]).to(device)
        return self.compressor.backbone.rerotate(tuple(tensor[..., places, :] for tensor in memory), turns)

    def place(self, t: int) -> int:
        """Return the position of the first slot of memory t: nothing leaves, so it is the same for all readers."""
        return self.schedule.place(t)

    @property
    def zero(self) -> torch.Tensor:
        """A loss of nothing."""
        backbone = self.compressor.backbone
        return torch.zeros((), dtype=torch.promote_types(backbone.dtype, torch.float32), device=backbone.device)

    def write(self, t: int, store: MemoryStore) -> Memory:
        """Return the memory of segment t given those before it."""
        memory = store.view(*self.schedule.span(t)) if self.compressor.recurrent and t else ()
        return self.compressor.write(self.segments[t], memory, self.place(t))

    def write_all(self, store: MemoryStore, numbers: Sequence[int], at_once: int | None = None) -> None:
        """Put the memories of some segments (of recurrent architectures of all of them) into `store`.

        Args:
            at_once: segments of a pass; None for as many as fill the device.
        """
        if self.compressor.recurrent:
            for t in numbers:
                store.put(t, self.write(t, store))
            return
        segments, places = [self.segments[s] for s in numbers], [self.place(s) for s in numbers]
        for s, memory in zip(numbers, self.compressor.write_all(segments, places, at_once), strict=True):
            store.put(s, memory)


def backprop(sweep: Sweep, policy: Policy, rng: np.random.Generator, group: Any = None) -> torch.Tensor:
    """Add the gradient of scale * sum_t J_t, weighed by `policy`, to the parameters; return sum_t J_t (no graph).

    The sum is over the segments whose loss depends on what is trained: under a frozen reader not those without a
    memory to read.

    Args:
        rng: draws the policy's schedule.
        group: process group whose ranks share this document's segments (independent architectures; exact and subset).
    """
    weights = policy.draw(sweep.visible, rng)
    recurrent = sweep.compressor.recurrent
    if policy.kind.executor == "graph":
        return _one_graph(sweep, group)
    if policy.kind.executor == "stream":
        return _stream(sweep, weights)
    return run_sweep(_Recurrent(sweep, weights)) if recurrent else _in_any_order(sweep, weights, group)


def _one_graph(sweep: Sweep, group: Any) -> torch.Tensor:
    """Autograd through everything; each rank of `group` takes its part of the whole gradient."""
    memories: list[Memory] = []
    fixed = sweep.new_store().fixed
    losses = []
    for t in range(len(sweep.segments)):
        first, last = sweep.schedule.span(t)
        memory = join([fixed if first == 0 else (), *memories[first:last]])
        loss, written = sweep.read(t, memory, write=t < len(sweep.slots))
        losses.append(loss)
        if written is not None:
            memories.append(written)
    total = torch.stack(losses).sum()
    if total.requires_grad:
        # every rank computes the whole gradient, and the engine adds the ranks' up
        size = 1 if group is None else dist.get_world_size(group)
        (total * sweep.scale / size).backward()
    return total.detach()


def _score(sweep: Sweep, t: int, store: MemoryStore, grads: MemoryGradients, weights: Weights) -> torch.Tensor:
    """Take the gradient of J_t with respect to the memories it reads (and of what else is trained); return J_t."""
    first, last = sweep.schedule.span(t)
    if not sweep.is_scored(t):
        return sweep.zero
    # leaves of its own for each reader: dJ_t/dm_s is multiplied by W[t, s] before it joins the sum
    leaves = store.leaves(first, last)
    loss, _ = sweep.read(t, leaves)
    (loss * sweep.scale).backward()
    grads.add(first, last, leaves, weights[t])
    return loss.detach()


def _pull_back(sweep: Sweep, s: int, store: MemoryStore, grads: MemoryGradients) -> None:
    """Encode segment s again and take its memory's gradient back to the parameters."""
    memory = sweep.write(s, store)
    torch.autograd.backward(memory, grads.of(s, memory))


def _in_any_order(sweep: Sweep, weights: Weights, group: Any) -> torch.Tensor:
    """Three passes over independent segments, each rank of `group` taking every P-th."""
    store = sweep.new_store()
    writers, readers = _share(len(sweep.slots), group), _share(len(sweep.segments), group)
    with torch.no_grad():
        # without a graph L segments take about what one takes with it: two tensors of a layer instead of all layers'
        sweep.write_all(store, writers, sweep.at_once or max(1, len(sweep.compressor.backbone.layers) // 2))
    _gather_memories(store, sweep, group)
    grads = MemoryGradients(store)
    total = sweep.zero
    for t in readers:
        total = total + _score(sweep, t, store, grads, weights)
    _scatter_gradients(grads, group)
    for s in writers:
        if weights[:, s].any():
            _pull_back(sweep, s, store, grads)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


@dataclass
class _Recurrent(Steps):
    """The segments of documents whose memories may depend on those before them in any way."""

    segments: Sweep
    weights: Weights

    def __post_init__(self) -> None:
        self.count = len(self.segments.segments)
        self.device = self.segments.compressor.backbone.device
        self.store = self.segments.new_store()
        self.grads: MemoryGradients | None = None

    def write(self, t: int) -> None:
        """Encode segment t."""
        self.store.put(t, self.segments.write(t, self.store))

    def pull_back(self, t: int) -> torch.Tensor:
        """Score segment t and encode it again: one backward pass for J_t and for what its readers left."""
        self.grads = self.grads or MemoryGradients(self.store)
        span = self.segments.schedule.span(t)
        leaves = self.store.leaves(*span)
        writes = t < self.count - 1 and bool(self.weights[:, t].any())
        loss, memory = self.segments.read(t, leaves, write=writes)
        roots, cotangents = [loss * self.segments.scale], [torch.ones_like(loss)]
        if memory is not None:
            roots, cotangents = [*roots, *memory], [*cotangents, *self.grads.of(t, memory)]
        graphs = [(root, cotangent) for root, cotangent in zip(roots, cotangents, strict=True) if root.requires_grad]
        if graphs:
            torch.autograd.backward([root for root, _ in graphs], [cotangent for _, cotangent in graphs])
        self.grads.add(*span, leaves, self.weights[t])
        return loss.detach()


def _stream(sweep: Sweep, weights: Weights) -> torch.Tensor:
    """Segments in order, each encoded once; its graph is kept until its last reader with a weight has run.

    The paper's incremental algorithm (appendix B) for any weights: one pull-back per segment, none for segments that
    no reader weighs.
    """
    store = sweep.new_store()
    live: dict[int, Memory] = {}
    grads: MemoryGradients | None = None
    losses = []
    for t in range(len(sweep.segments)):
        if t:
            grads = grads or MemoryGradients(store)
            losses.append(_score(sweep, t, store, grads, weights))
            for s in [s for s in live if not weights[t + 1 :, s].any()]:
                memory = live.pop(s)
                torch.autograd.backward(memory, grads.of(s, memory))
        else:
            losses.append(_score(sweep, t, store, MemoryGradients(store), weights))
        if t < len(sweep.slots):
            needed = bool(weights[:, t].any())
            # without a reader that weighs it the graph would only carry zeros back
            with torch.set_grad_enabled(needed):
                memory = sweep.write(t, store)
            store.put(t, tuple(tensor.detach() for tensor in memory))
            if needed:
                live[t] = memory
    return torch.stack(losses).sum()


# --- segment parallelism: ranks exchange memories and their gradients -------------------------------------------------


def _share(count: int, group: Any) -> list[int]:
    """Return the segments of 0 .. count - 1 that are this rank's: every P-th, so late ones are dealt out."""
    if group is None:
        return list(range(count))
    # late segments read more memories: dealt out in turn, all ranks have about the same work
    return list(range(dist.get_rank(group), count, dist.get_world_size(group)))


def _gather_memories(store: MemoryStore, sweep: Sweep, group: Any) -> None:
    """Fill `store` with what the other ranks have encoded (all-gather)."""
    if group is None or not sweep.slots:
        return
    if not store.tensors:  # fewer segments than ranks: an empty hand still needs buffers of the right shape
        with torch.no_grad():
            shapes = sweep.compressor.write_batch([sweep.segments[0]], [store.bounds[0]])[0]
        store.put(0, tuple(torch.zeros_like(tensor) for tensor in shapes))
    for buffer in store.tensors:
        packed = _pack(buffer, store.bounds, group)
        mine = packed[dist.get_rank(group)].contiguous()
        gathered = torch.empty_like(packed)
        dist.all_gather(list(gathered.unbind(0)), mine, group=group)
        _unpack(gathered, buffer, store.bounds, group)


def _scatter_gradients(grads: MemoryGradients, group: Any) -> None:
    """Leave on each rank the sum over ranks of its own segments' gradients (reduce-scatter)."""
    if group is None:
        return
    rank = dist.get_rank(group)
    for buffer in grads.buffers():
        packed = _pack(buffer, grads.store.bounds, group)
        mine = torch.empty_like(packed[0])
        dist.reduce_scatter(mine, list(packed.unbind(0)), group=group)
        packed[rank] = mine  # the other ranks' slots keep partial sums, which nobody reads
        _unpack(packed, buffer, grads.store.bounds, group, only=rank)


def _hands(bounds: list[int], group: Any) -> list[list[int]]:
    """Return the slots of every rank's segments."""
    size, count = dist.get_world_size(group), len(bounds) - 1
    return [
        [slot for s in range(rank, count, size) for slot in range(bounds[s], bounds[s + 1])] for rank in range(size)
    ]


def _pack(buffer: torch.Tensor, bounds: list[int], group: Any) -> torch.Tensor:
    """Return [P, slots, ...]: each rank's slots side by side, padded to equal size."""
    hands, by_slot = _hands(bounds, group), buffer.movedim(-2, 0)
    packed = by_slot.new_zeros((len(hands), max(map(len, hands)), *by_slot.shape[1:]))
    for row, hand in zip(packed, hands, strict=True):
        row[: len(hand)] = by_slot[hand]
    return packed


def _unpack(packed: torch.Tensor, buffer: torch.Tensor, bounds: list[int], group: Any, only: int | None = None) -> None:
    by_slot = buffer.movedim(-2, 0)
    for rank, hand in enumerate(_hands(bounds, group)):
        if only in (None, rank):
            by_slot[hand] = packed[rank, : len(hand)]
