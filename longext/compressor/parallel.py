"""Segment parallelism: the ranks of a group share one document's segments and exchange memories and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longext.compressor.memory import MemoryGradients, MemoryStore

if TYPE_CHECKING:
    from longext.compressor.gradients import Document


def share(count: int, group: Any) -> list[int]:
    """Return the segments of 0 .. count - 1 that are this rank's: every P-th, so late ones are dealt out."""
    if group is None:
        return list(range(count))
    return list(range(dist.get_rank(group), count, dist.get_world_size(group)))


def gather_memories(store: MemoryStore, document: Document, group: Any) -> None:
    """Fill `store` with what the other ranks have encoded (all-gather)."""
    if group is None or not document.slots:
        return
    if not store.tensors:  # fewer segments than ranks: an empty hand still needs buffers of the right shape
        with torch.no_grad():
            made = document.compressor.write_batch([document.segments[0]], [store.bounds[0]])[0]
        store.put(0, tuple(torch.zeros_like(tensor) for tensor in made))
    for buffer in store.tensors:
        packed = _pack(buffer, store.bounds, group)
        mine = packed[dist.get_rank(group)].contiguous()
        gathered = torch.empty_like(packed)
        dist.all_gather(list(gathered.unbind(0)), mine, group=group)
        _unpack(gathered, buffer, store.bounds, group)


def scatter_gradients(grads: MemoryGradients, group: Any) -> None:
    """Leave on each rank the sum over ranks of its own segments' gradients (reduce-scatter)."""
    if group is None:
        return
    rank = dist.get_rank(group)
    for buffer in grads.buffers():
        packed = _pack(buffer, grads.store.bounds, group)
        mine = torch.empty_like(packed[0])
        dist.reduce_scatter(mine, list(packed.unbind(0)), group=group)
        packed[rank] = mine
        _unpack(packed, buffer, grads.store.bounds, group, only=rank)


def _width(bounds: list[int], size: int) -> int:
    """Return the slots of the rank that has most."""
    slots = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    return max(sum(slots[rank::size]) for rank in range(size))


def _pack(buffer: torch.Tensor, bounds: list[int], group: Any) -> torch.Tensor:
    """Return [P, slots, ...]: each rank's slots side by side, padded to equal size."""
    size = dist.get_world_size(group)
    by_slot = buffer.movedim(-2, 0)
    packed = by_slot.new_zeros((size, _width(bounds, size), *by_slot.shape[1:]))
    for rank in range(size):
        place = 0
        for s in range(rank, len(bounds) - 1, size):
            count = bounds[s + 1] - bounds[s]
            packed[rank, place : place + count] = by_slot[bounds[s] : bounds[s + 1]]
            place += count
    return packed


def _unpack(packed: torch.Tensor, buffer: torch.Tensor, bounds: list[int], group: Any, only: int | None = None) -> None:
    by_slot = buffer.movedim(-2, 0)
    size = dist.get_world_size(group)
    for rank in range(size) if only is None else [only]:
        place = 0
        for s in range(rank, len(bounds) - 1, size):
            count = bounds[s + 1] - bounds[s]
            by_slot[bounds[s] : bounds[s + 1]] = packed[rank, place : place + count]
            place += count
