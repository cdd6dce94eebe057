"""Keys and values that a chunk of a row reads of earlier chunks, and the gradients that it leaves for them.

A sweep (`training.sweep`) runs the chunks of a row in order without a graph, then in reverse with one. `recall` stands
between a layer's projections and its attention: it puts the earlier keys and values in front of the chunk's own. To
autograd they are constants; their gradient goes to the store, and the chunk that they came from adds it to its own.

Shape legend: B rows, K key-value heads, C tokens of a chunk, m earlier tokens that it sees, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from longext.attention.layout import Columns, Layout
from longext.attention.variant import Cut

Pair = tuple[torch.Tensor, torch.Tensor]  # of keys and of values
Place = tuple[int, int]  # number of a layer, and of the part of its heads


@dataclass
class _Tail:
    """The last tokens of one chunk, those that later chunks see: [B, K, n, D], memory in the order [B, n, K, D].

    Attributes:
        start, stop: their columns.
        gradients: what later chunks have left so far, or None.
    """

    start: int
    stop: int
    pair: Pair
    gradients: Pair | None = None


@dataclass
class KeyValueStore:
    """The tails of all chunks of one batch, for every layer and part of its heads.

    Attributes:
        room: bytes of keys and values that may stay on the device; the rest is in pinned host memory.
        gradient_room: the same for gradients.
        kept_bytes: of keys and values that chunks have kept so far.
    """

    room: float = math.inf
    gradient_room: float = math.inf
    kept_bytes: int = 0
    _tails: dict[Place, dict[int, _Tail]] = field(default_factory=dict)

    def keep(self, place: Place, number: int, start: int, stop: int, pair: Pair) -> None:
        """Keep keys and values [B, K, n, D] of the columns start .. stop - 1 of chunk `number`, if not done yet."""
        tails = self._tails.setdefault(place, {})
        if number not in tails and start < stop:
            size = sum(x.numel() * x.element_size() for x in pair)
            on_device = size <= self.room
            self.room -= size if on_device else 0
            self.kept_bytes += size
            tails[number] = _Tail(start, stop, self._copied(pair, on_device))

    def earlier(self, place: Place, first: int, start: int) -> list[_Tail]:
        """Return the tails with columns among first .. start - 1, in order."""
        tails = self._tails.get(place, {})
        return [tails[n] for n in sorted(tails) if tails[n].stop > first and tails[n].start < start]

    def leave(self, tail: _Tail, gradients: Pair) -> None:
        """Add a later chunk's gradients [B, K, n, D] to those of a tail; sums are in float32 at least."""
        if tail.gradients is None:
            size = sum(x.numel() * max(4, x.element_size()) for x in gradients)
            on_device = size <= self.gradient_room
            self.gradient_room -= size if on_device else 0
            tail.gradients = self._copied(gradients, on_device)
            return
        sums = [_summed(total, gradient) for total, gradient in zip(tail.gradients, gradients, strict=True)]
        tail.gradients = (sums[0], sums[1])

    def left(self, place: Place, number: int) -> _Tail | None:
        """Return the tail of chunk `number` if later chunks have left gradients for it."""
        tail = self._tails.get(place, {}).get(number)
        return tail if tail is not None and tail.gradients is not None else None

    def forget(self, number: int) -> None:
        """Drop the tails of a chunk; its gradient has been taken."""
        for tails in self._tails.values():
            tails.pop(number, None)

    def _copied(self, pair: Pair, on_device: bool) -> Pair:
        """Return copies that hold on to nothing else."""
        copies = []
        for x in pair:
            ordered = x.detach().transpose(1, 2)
            if on_device or x.device.type == "cpu":
                copy = torch.empty(ordered.shape, dtype=x.dtype, device=x.device).copy_(ordered)
            else:
                copy = _on_host(ordered.contiguous())
            copies.append(copy.transpose(1, 2))
        return copies[0], copies[1]


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _on_host(x: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """Copy a tensor to pinned memory in the device's order of work: the host itself must not read the copy."""
    into = torch.empty(x.shape, dtype=x.dtype, pin_memory=True) if into is None else into
    return into.copy_(x, non_blocking=True)


def _summed(total: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the sum in float32 at least, where `total` is."""
    wide = _wide(total)
    if total.device == gradient.device:
        return total.to(wide).add_(gradient)
    onto = total.to(gradient.device, non_blocking=True).to(wide).add_(gradient)
    return _on_host(onto, total if total.dtype == wide else None)


@dataclass(frozen=True)
class Chunk:
    """Where a forward pass over one chunk is: the tokens start .. stop - 1 of every row.

    Attributes:
        number: of the chunk.
    """

    number: int
    start: int
    stop: int
    store: KeyValueStore

    def recall(
        self, pair: Pair, place: Place, layout: Layout, cut: Cut, group_size: int, window: int | None
    ) -> tuple[Pair, Columns]:
        """Return the chunk's keys and values [B, K, C, D] behind those it sees of earlier chunks, and their columns.

        What later chunks see of its own is kept.
        """
        first = layout.reach(cut, group_size, window, self.start)
        kept = max(self.start, layout.reach(cut, group_size, window, self.stop))
        columns = Columns(self.start, self.stop, first)
        if first == self.start and kept == self.stop:
            return pair, columns
        key, value = _Recall.apply(*pair, self, place, columns, kept)
        return (key, value), columns


class _Recall(torch.autograd.Function):
    """[B, K, C, D] -> [B, K, m + C, D], twice: earlier tokens in front, their gradients through the store."""

    @staticmethod
    def forward(
        ctx: Any, key: torch.Tensor, value: torch.Tensor, chunk: Chunk, place: Place, columns: Columns, kept: int
    ) -> Pair:
        """Put the earlier keys and values in front."""
        ctx.chunk, ctx.place, ctx.columns = chunk, place, columns
        ctx.set_materialize_grads(True)
        own = slice(kept - chunk.start, None)
        chunk.store.keep(place, chunk.number, kept, chunk.stop, (key[:, :, own], value[:, :, own]))
        tails = chunk.store.earlier(place, columns.first, columns.start)
        if not tails:
            return key.view_as(key), value.view_as(value)
        joined = []
        for which, x in enumerate((key, value)):
            rows, heads, length, width = x.shape
            earlier = columns.start - columns.first
            out = torch.empty(rows, earlier + length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)
            for tail in tails:
                here = slice(max(0, tail.start - columns.first), tail.stop - columns.first)
                there = tail.pair[which][:, :, max(0, columns.first - tail.start) :]
                out[:, :, here].copy_(there, non_blocking=True)
            out[:, :, earlier:] = x
            joined.append(out)
        return joined[0], joined[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Leave the earlier tokens' gradients in the store, and add to the own ones what later chunks have left."""
        chunk, columns, store = ctx.chunk, ctx.columns, ctx.chunk.store
        earlier = columns.start - columns.first
        for tail in store.earlier(ctx.place, columns.first, columns.start):
            here = slice(max(0, tail.start - columns.first), tail.stop - columns.first)
            cut = max(0, columns.first - tail.start)
            whole = [g[:, :, here] for g in gradients]
            if cut:  # the tail begins before what this chunk sees
                whole = [torch.cat([g.new_zeros(*g.shape[:2], cut, g.shape[3]), g], 2) for g in whole]
            store.leave(tail, (whole[0], whole[1]))
        own = [g[:, :, earlier:] for g in gradients]
        tail = store.left(ctx.place, chunk.number)
        if tail is not None:
            here = slice(tail.start - columns.start, None)
            own = [_added(g, here, left) for g, left in zip(own, tail.gradients, strict=True)]
        return (*own, None, None, None, None)


def _added(gradient: torch.Tensor, here: slice, left: torch.Tensor) -> torch.Tensor:
    """Return a gradient with what is `left` added to some of its columns; the sum is rounded once."""
    total = gradient.clone()
    part = gradient[:, :, here]
    total[:, :, here] = left.to(part.device, _wide(part), non_blocking=True).add(part).to(part.dtype)
    return total
