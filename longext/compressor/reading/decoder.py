"""A frozen model that keeps the keys and values of what it has read, behind a memory or behind nothing; many rows.

Shape legend: B rows, n new tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from longext.checkpoint.checks import not_numbers
from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor
from longext.compressor.memory import Memory
from longext.models.decode import continue_rows


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values at the start of a buffer with room behind them, so that a token more copies nothing."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: list[torch.Tensor] = []

    @property
    def filled(self) -> int:
        """Positions in the buffer."""
        return 0 if not self._buffers else int(self.keys.shape[-2])

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [B, num_kv_heads, n, head_dim] and return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start = self.filled
        end = start + keys.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            self._grow(keys, values, end)
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _grow(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        new = [t.new_empty((*t.shape[:-2], end + self.room, t.shape[-1])) for t in (keys, values)]
        for buffer, old in zip(new, self._buffers, strict=False):
            buffer[..., : old.shape[-2], :] = old
        self._buffers = new


class CachedDecoder:
    """Tokens in, last hidden states out; what was fed before stays readable.

    Args:
        backbone: the frozen model.
        embed: token ids [B, n] -> input vectors [B, n, D]; None for the model's own.
        prefix: a `kv` memory in front.
        rows: input vectors [B, m, D] in front (sink and `soft` memory), fed with the first tokens.
        adapted: the adapters under which it runs; none for the model by itself.
        room: tokens to keep room for behind the first ones.
        layers: a cache of its own kind, in place of prefix and room.
    """

    def __init__(
        self,
        backbone: Backbone,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        prefix: Memory = (),
        rows: torch.Tensor | None = None,
        adapted: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        room: int = 0,
        layers: Sequence[RoomyLayer] | None = None,
    ) -> None:
        self.backbone = backbone
        self._embed = embed or backbone.embed
        self._rows = rows
        self._adapted = adapted
        self._layers = [RoomyLayer(room) for _ in backbone.layers] if layers is None else list(layers)
        for layer, keys, values in zip(self._layers, prefix[::2], prefix[1::2], strict=False):
            layer.update(keys, values)
        self._cache = Cache(layers=self._layers)

    @property
    def length(self) -> int:
        """Positions read so far, memory slots included."""
        return int(self._layers[0].get_seq_length())

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values it keeps (room for more left out)."""
        return sum(states.nbytes for layer in self._layers for states in (layer.keys, layer.values))

    def truncate(self, length: int) -> None:
        """Forget all positions but the first `length`."""
        if length < self.length:  # to some versions of transformers a crop by 0 leaves nothing
            self._cache.crop(length - self.length)

    @torch.no_grad()
    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [B, n, D] (after the final norm) of int64 [B, n] given all before."""
        embeds = self._embed(tokens)
        if self._rows is not None:
            embeds, self._rows = torch.cat([self._rows, embeds], 1), None
        positions = torch.arange(self.length, self.length + embeds.shape[1], device=embeds.device)
        with self._adapted():
            output = self.backbone.decoder(
                inputs_embeds=embeds,
                position_ids=positions.expand(len(embeds), -1),
                past_key_values=self._cache,
                use_cache=True,
            )
        hidden: torch.Tensor = output.last_hidden_state[:, -tokens.shape[1] :]
        return hidden

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] of what follows `tokens`, those of the last position alone.

        Raises:
            LongextError: they are not numbers.
        """
        return last_logits(self.backbone, self.feed(tokens), self.length)


@torch.no_grad()
def last_logits(backbone: Backbone, hidden: torch.Tensor, length: int) -> torch.Tensor:
    """Return the logits [B, V] of the last hidden states of [B, n, D], `length` positions into the text.

    Raises:
        LongextError: they are not numbers.
    """
    logits = backbone.logits(hidden[:, -1])
    if bool(logits.isnan().any()):
        raise not_numbers(f"after {length:,} positions")
    return logits


@torch.no_grad()
def memory_decoder(
    compressor: Compressor, sink: torch.Tensor, memory: Memory, ratio: int, room: int = 0
) -> CachedDecoder:
    """Return a decoder behind `memory` that, fed the tokens of a segment (those before it too), equals `read`.

    Args:
        sink: int64 [B, s], of the segment; empty for segment 0.
        memory: as `Compressor.read` takes it: for `kv` fixed slots and memories, for `soft` memories alone.
        ratio: of the segment.
        room: tokens to keep room for behind the first ones.
    """
    is_soft = compressor.is_soft
    return CachedDecoder(
        compressor.backbone,
        compressor.embed,
        prefix=() if is_soft else memory,
        rows=compressor.prefix_rows(sink, memory, ratio) if is_soft else None,
        adapted=compressor.reading,
        room=room,
    )


def greedy(decoder: CachedDecoder, tokens: torch.Tensor, count: int, stop: Collection[int] = ()) -> list[list[int]]:
    """Return the greedy continuations of B rows after `tokens` [B, n]: `count` tokens, fewer if one of `stop` comes.

    The stopping token is left out.
    """
    unread = tokens

    def take(new: torch.Tensor) -> None:
        nonlocal unread
        unread = new

    tokens_out = continue_rows(lambda: decoder.next_logits(unread), take, count, stop, num_rows=len(tokens))
    return [row[:-1] if row and row[-1] in stop else row for row in tokens_out]
