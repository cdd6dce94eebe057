"""Gradients through a document's memories with one segment's graph alive, and the policies that weigh them.

Memories are leaves (keys and values after projection and rotation). No memory of an independent architecture depends on
another, so dJ/dm_s adds up over the readers t > s and is pulled back through segment s once:

    encode all s without a graph;  for each t: J_t.backward() into the leaves;  for each s: encode again, pull back.

For recurrent architectures the same holds in reverse order (t = T .. 1): at t, all readers of m_t have run.
Both equal autograd through one graph of the whole document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from longext.compressor.base import Compressor, Segment
from longext.compressor.memory import Memory, MemoryGradients, MemoryStore, join
from longext.compressor.policies import Policy, Weights
from longext.training.losses import IGNORED


@dataclass
class Document:
    """B documents of T segments each, and where their memories go.

    Attributes:
        segments: in order.
        compressor: who reads and writes.
        scale: every loss is multiplied by it before its gradient is taken.
    """

    segments: Sequence[Segment]
    compressor: Compressor
    scale: float = 1.0

    def __post_init__(self) -> None:
        length = self.compressor.spec.segment
        # memories wholly inside the raw tokens before a segment are not read
        self.visible = [t - segment.before.shape[1] // length for t, segment in enumerate(self.segments)]
        self.slots = [self.compressor.slots(segment.ratio) for segment in self.segments[:-1]]

    @property
    def is_soft(self) -> bool:
        """True where memories take no room in a cache until they are read."""
        return self.compressor.is_soft

    def new_store(self) -> MemoryStore:
        """Return an empty store with the sink's keys and values in front."""
        return MemoryStore(self.compressor.fixed(self.segments[-1].sink), self.slots)

    def span(self, t: int) -> tuple[int, int]:
        """Return the memories first .. last - 1 that segment t reads."""
        last = self.visible[t]
        return (max(0, last - 1), last) if self.compressor.reads_last else (0, last)

    def is_scored(self, t: int) -> bool:
        """True where segment t has labels, and its loss depends on anything that is trained."""
        segment = self.segments[t]
        trained = self.compressor.trains_reader or self.visible[t] > 0 or bool((segment.tokens < 0).any())
        return trained and bool((segment.labels != IGNORED).any())

    def read(self, t: int, memory: Memory, *, write: bool = False) -> tuple[torch.Tensor, Memory | None]:
        """Return (loss of segment t, its memory where `write`); 0 where nothing trained is scored."""
        first = 0 if t >= len(self.slots) else sum(self.slots[:t]) + self.segments[-1].sink.shape[1]
        scored = self.is_scored(t)
        if not scored and not write:
            return self.zero, None
        memory = memory if t else ()  # segment 0 holds the sink itself
        loss, made = self.compressor.step(self.segments[t], memory, first, loss=scored, write=write)
        return self.zero if loss is None else loss, made

    @property
    def zero(self) -> torch.Tensor:
        """A loss of nothing."""
        backbone = self.compressor.backbone
        return torch.zeros((), dtype=torch.promote_types(backbone.dtype, torch.float32), device=backbone.device)

    def write(self, t: int, store: MemoryStore) -> Memory:
        """Return the memory of segment t given those before it."""
        memory = store.view(*self.span(t)) if self.compressor.recurrent and t else ()
        return self.compressor.write(self.segments[t], memory, store.bounds[t])


def backprop(document: Document, policy: Policy, rng: np.random.Generator, group: Any = None) -> torch.Tensor:
    """Add the gradient of scale * sum_t J_t, weighed by `policy`, to the parameters; return sum_t J_t (no graph).

    The sum is over the segments whose loss depends on what is trained: under a frozen reader not those without a
    memory to read.

    Args:
        rng: draws the policy's schedule.
        group: process group whose ranks share this document's segments (independent architectures; exact and subset).
    """
    weights = policy.draw(document.visible, rng)
    recurrent = document.compressor.recurrent
    if policy.kind.executor == "graph":
        return _one_graph(document, group)
    if policy.kind.executor == "stream":
        return _stream(document, weights)
    return _reverse_sweep(document, weights) if recurrent else _sweep(document, weights, group)


def _one_graph(document: Document, group: Any) -> torch.Tensor:
    """Autograd through everything; each rank of `group` takes its part of the whole gradient."""
    made: list[Memory] = []
    fixed = document.new_store().fixed
    losses = []
    for t in range(len(document.segments)):
        first, last = document.span(t)
        memory = join([fixed if first == 0 else (), *made[first:last]])
        loss, written = document.read(t, memory, write=t < len(document.slots))
        losses.append(loss)
        if written is not None:
            made.append(written)
    total = torch.stack(losses).sum()
    if total.requires_grad:
        size = 1 if group is None else dist.get_world_size(group)
        (total * document.scale / size).backward()
    return total.detach()


def _score(document: Document, t: int, store: MemoryStore, grads: MemoryGradients, weights: Weights) -> torch.Tensor:
    """Take the gradient of J_t with respect to the memories it reads (and of what else is trained); return J_t."""
    first, last = document.span(t)
    if not document.is_scored(t):
        return document.zero
    leaves = store.leaves(first, last)
    loss, _ = document.read(t, leaves)
    (loss * document.scale).backward()
    grads.add(first, last, leaves, weights[t])
    return loss.detach()


def _pull_back(document: Document, s: int, store: MemoryStore, grads: MemoryGradients) -> None:
    """Encode segment s again and take its memory's gradient back to the parameters."""
    memory = document.write(s, store)
    torch.autograd.backward(memory, grads.of(s, memory))


def _sweep(document: Document, weights: Weights, group: Any) -> torch.Tensor:
    """Three passes over independent segments, each rank of `group` taking every P-th."""
    from longext.compressor.parallel import gather_memories, scatter_gradients, share

    store = document.new_store()
    writers, readers = share(len(document.slots), group), share(len(document.segments), group)
    with torch.no_grad():
        segments, slots = [document.segments[s] for s in writers], [store.bounds[s] for s in writers]
        made = document.compressor.write_all(segments, slots, _segments_at_once(document))
        for s, memory in zip(writers, made, strict=True):
            store.put(s, memory)
    gather_memories(store, document, group)
    grads = MemoryGradients(store)
    total = document.zero
    for t in readers:
        total = total + _score(document, t, store, grads, weights)
    scatter_gradients(grads, group)
    for s in writers:
        if weights[:, s].any():
            _pull_back(document, s, store, grads)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def _segments_at_once(document: Document) -> int:
    # without a graph L segments take about what one takes with it: two tensors of a layer instead of all layers'
    return max(1, len(document.compressor.backbone.layers) // 2)


def _reverse_sweep(document: Document, weights: Weights) -> torch.Tensor:
    """One pass forward without a graph, one backward in reverse order, for any dependence between memories."""
    store = document.new_store()
    last = len(document.slots)
    with torch.no_grad():
        for t in range(last):
            store.put(t, document.write(t, store))
    grads = MemoryGradients(store)
    losses = []
    for t in reversed(range(len(document.segments))):
        span = document.span(t)
        leaves = store.leaves(*span)
        writes = t < last and bool(weights[:, t].any())
        loss, memory = document.read(t, leaves, write=writes)
        roots, cotangents = [loss * document.scale], [torch.ones_like(loss)]
        if memory is not None:
            roots, cotangents = [*roots, *memory], [*cotangents, *grads.of(t, memory)]
        graphs = [(root, given) for root, given in zip(roots, cotangents, strict=True) if root.requires_grad]
        if graphs:
            torch.autograd.backward([root for root, _ in graphs], [given for _, given in graphs])
        grads.add(*span, leaves, weights[t])
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _stream(document: Document, weights: Weights) -> torch.Tensor:
    """Segments in order, each encoded once; its graph is kept until its last reader with a weight has run.

    The paper's incremental algorithm (appendix B) for any weights: one pull-back per segment, none for segments that
    no reader weighs.
    """
    store = document.new_store()
    live: dict[int, Memory] = {}
    grads: MemoryGradients | None = None
    losses = []
    for t in range(len(document.segments)):
        if t:
            grads = grads or MemoryGradients(store)
            losses.append(_score(document, t, store, grads, weights))
            for s in [s for s in live if not weights[t + 1 :, s].any()]:
                memory = live.pop(s)
                torch.autograd.backward(memory, grads.of(s, memory))
        else:
            losses.append(_score(document, t, store, MemoryGradients(store), weights))
        if t < len(document.slots):
            needed = bool(weights[:, t].any())
            with torch.set_grad_enabled(needed):
                memory = document.write(t, store)
            store.put(t, tuple(tensor.detach() for tensor in memory))
            if needed:
                live[t] = memory
    return torch.stack(losses).sum()
