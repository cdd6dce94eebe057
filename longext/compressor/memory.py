"""Memories of a document: where they are kept, how a frozen model reads them, where their gradients add up.

A memory is a flat tuple of tensors whose axis -2 counts slots: `kv` has keys and values of every layer (K0, V0, K1,
..., each [B, num_kv_heads, k, head_dim], keys rotated to their final positions), `soft` one tensor [B, k, D].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

Memory = tuple[torch.Tensor, ...]


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in front of those of the call; stores nothing, so a checkpointed layer may run twice."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prefix and new states joined along the slots."""
        return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)


class PrefixCache(Cache):  # type: ignore[misc]
    """A read-only KV cache that holds a `kv` memory; gradients flow into it."""

    def __init__(self, memory: Memory) -> None:
        pairs = zip(memory[::2], memory[1::2], strict=True)
        super().__init__(layers=[_PrefixLayer(keys, values) for keys, values in pairs])


class CapturedStates:
    """Takes the cache's place in one attention call, and stores the keys and values of that call."""

    def __init__(self) -> None:
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the states and hand them on as they are."""
        self.states = (keys, values)
        return keys, values


def join(memories: Sequence[Memory]) -> Memory:
    """Return memories side by side along their slots; one without tensors is nothing."""
    parts = [memory for memory in memories if memory]
    return tuple(torch.cat(tensors, -2) for tensors in zip(*parts, strict=True)) if parts else ()


def num_slots(memory: Memory) -> int:
    """Return how many slots a memory has."""
    return memory[0].shape[-2] if memory else 0


def num_bytes(memory: Memory) -> int:
    """Return the bytes its tensors hold on to: whole storages, so that a view counts as what it keeps alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in memory}
    return sum(storages.values())


class MemoryStore:
    """The memories of one batch of documents, in one preallocated buffer per tensor.

    Args:
        fixed: what comes before all memories (the keys and values of sink tokens), or ().
        slots: slots of each segment's memory, in order.

    Attributes:
        bounds: segment s has slots bounds[s] .. bounds[s + 1]; bounds[0] is the number of fixed slots.
        tensors: the buffers [..., bounds[-1], width], made by the first `put`.
    """

    def __init__(self, fixed: Memory, slots: Sequence[int]) -> None:
        self.fixed = fixed
        self.bounds = list(itertools.accumulate(slots, initial=num_slots(fixed)))
        self.tensors: Memory = ()

    def put(self, segment: int, memory: Memory) -> None:
        """Copy the memory of `segment` into its place."""
        if not self.tensors:
            self._allocate(memory)
        for buffer, tensor in zip(self.tensors, memory, strict=True):
            buffer[..., self.bounds[segment] : self.bounds[segment + 1], :] = tensor

    def _allocate(self, like: Memory) -> None:
        shapes = [(*tensor.shape[:-2], self.bounds[-1], tensor.shape[-1]) for tensor in like]
        self.tensors = tuple(t.new_empty(shape) for t, shape in zip(like, shapes, strict=True))
        # strict=False: without a sink `fixed` is empty
        for buffer, tensor in zip(self.tensors, self.fixed, strict=False):
            buffer[..., : tensor.shape[-2], :] = tensor

    def view(self, first: int, last: int) -> Memory:
        """Return the memories of segments first .. last - 1, with the fixed slots if `first` is 0."""
        if not self.tensors:
            return self.fixed
        start = 0 if first == 0 else self.bounds[first]
        return tuple(buffer[..., start : self.bounds[last], :] for buffer in self.tensors)

    def leaves(self, first: int, last: int) -> Memory:
        """Return `view` as tensors that gather gradients."""
        return tuple(tensor.detach().requires_grad_() for tensor in self.view(first, last))


class MemoryGradients:
    """Sums of dJ/dm over the readers of each memory, in float32 (float64 for float64 memories).

    bfloat16 sums lose 2e-3 of the gradient over 32 segments, float32 3e-8.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.sums: Memory = ()

    def buffers(self) -> Memory:
        """Return the sums, zero if nothing has been added."""
        if not self.sums:
            self.sums = tuple(
                torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)
                for t in self.store.tensors
            )
        return self.sums

    def add(self, first: int, last: int, leaves: Memory, weights: Sequence[float]) -> None:
        """Add the gradients of `leaves` (from `store.leaves(first, last)`), segment s times `weights[s]`."""
        bounds = self.store.bounds
        offset = 0 if first == 0 else bounds[first]
        for total, leaf in zip(self.buffers(), leaves, strict=True):
            if leaf.grad is None:
                continue
            for s in range(first, last):
                if weights[s]:
                    here = slice(bounds[s], bounds[s + 1])
                    there = slice(bounds[s] - offset, bounds[s + 1] - offset)
                    total[..., here, :].add_(leaf.grad[..., there, :], alpha=weights[s])

    def of(self, segment: int, like: Memory) -> Memory:
        """Return the gradient of one segment's memory in the dtypes of `like`."""
        here = slice(self.store.bounds[segment], self.store.bounds[segment + 1])
        return tuple(g[..., here, :].to(m.dtype) for g, m in zip(self.buffers(), like, strict=True))
