"""The common part of UIO, ICAE and Gist: probes appended to a segment read it into memory, apart from all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longext.compressor.base import Compressor, Segment
from longext.compressor.masks import causal_mask, prefix_mask, probe_positions
from longext.compressor.memory import Memory


class ProbeCompressor(Compressor):
    """An encoder pass over [segment | probes]; memories depend on their own segment alone.

    Attributes of a class:
        encoder, transfer: adapter sets of the encoder pass and of the projection to keys and values; None for the
            frozen model.
        nested: probes read prefixes and not each other (`prefix_mask`); else they are causal.
    """

    encoder: str | None = None
    transfer: str | None = None

    def probes(self, count: int) -> torch.Tensor:
        """Return the probes' input vectors [count, D]."""
        raise NotImplementedError

    def write(self, segment: Segment, memory: Memory, first_slot: int) -> Memory:
        """Encode one segment."""
        return self.encode(segment.tokens, segment.ratio, torch.tensor([first_slot]).expand(len(segment.tokens)))

    def write_batch(self, segments: Sequence[Segment], first_slots: Sequence[int]) -> list[Memory]:
        """Encode segments of one ratio in one pass."""
        made: dict[int, Memory] = {}
        for ratio in sorted({segment.ratio for segment in segments}):
            chosen = [i for i, segment in enumerate(segments) if segment.ratio == ratio]
            sizes = [len(segments[i].tokens) for i in chosen]
            starts = torch.tensor([first_slots[i] for i in chosen]).repeat_interleave(torch.tensor(sizes))
            memory = self.encode(torch.cat([segments[i].tokens for i in chosen]), ratio, starts)
            parts = [tensor.split(sizes) for tensor in memory]
            made |= {i: tuple(part[j] for part in parts) for j, i in enumerate(chosen)}
        return [made[i] for i in range(len(segments))]

    def encode(self, tokens: torch.Tensor, ratio: int, first_slots: torch.Tensor) -> Memory:
        """Return the memories of R segments: tokens int64 [R, l], their first slots int64 [R]."""
        embeds, positions, mask = self._inputs(tokens, ratio)
        rows = slice(tokens.shape[1], None)
        with self.adapters.use(self.encoder):
            if self.is_soft:
                return (self.backbone.run(embeds, positions, mask=mask)[:, rows],)
            captured = self.backbone.attention_inputs(embeds, rows, positions, mask)
        count = embeds.shape[1] - tokens.shape[1]
        slots = first_slots[:, None] + torch.arange(count)
        with self.adapters.use(self.transfer):
            return self.backbone.project(captured, slots.to(tokens.device))

    def _inputs(self, tokens: torch.Tensor, ratio: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, length = tokens.shape
        count, device = length // ratio, tokens.device
        embeds = torch.cat([self.embed(tokens), self.rows(self.probes(count), batch)], 1)
        text = torch.arange(length, device=device)
        if self.nested:
            positions = torch.cat([text, probe_positions(length, ratio, device)])
            return embeds, positions, prefix_mask(length, ratio, device)
        return embeds, torch.arange(length + count, device=device), causal_mask(length + count, device)
