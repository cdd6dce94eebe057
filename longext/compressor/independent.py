"""Architectures whose memories depend on no other: a segment is encoded by itself, [segment | probes].

Shape legend: l text tokens of a segment, K probes (memory slots), R segments, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longext.compressor.base import Compressor
from longext.compressor.memory import Memory
from longext.compressor.segments import Segment


class IndependentCompressor(Compressor):
    """An encoder pass over a segment and what reads it out; segments are written in any order, many at a time.

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
        memories: dict[int, Memory] = {}
        for ratio in sorted({segment.ratio for segment in segments}):
            chosen = [i for i, segment in enumerate(segments) if segment.ratio == ratio]
            sizes = [len(segments[i].tokens) for i in chosen]
            starts = torch.tensor([first_slots[i] for i in chosen]).repeat_interleave(torch.tensor(sizes))
            memory = self.encode(torch.cat([segments[i].tokens for i in chosen]), ratio, starts)
            parts = [tensor.split(sizes) for tensor in memory]
            memories |= {i: tuple(part[j] for part in parts) for j, i in enumerate(chosen)}
        return [memories[i] for i in range(len(segments))]

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


def probe_positions(length: int, ratio: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the RoPE positions of the K = length / ratio probes, int64 [K]: probe i at (i + 1) ratio.

    It shares the position of the next text token (UIO-LLMs, arXiv 2406.18173, released code), so that the probes of
    ratio 2c are every second probe of ratio c.
    """
    return torch.arange(ratio, length + 1, ratio, device=device)


def prefix_mask(length: int, ratio: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return bool [L + K, L + K], True if row sees column: causal text; probe i the text before (i + 1) ratio.

    Text never sees a probe, and a probe sees no other, so each is a read-out of a prefix, whatever the others are.
    """
    probes = length // ratio
    mask = torch.zeros(length + probes, length + probes, dtype=torch.bool, device=device)
    text = torch.arange(length, device=device)
    mask[:length, :length] = text[:, None] >= text
    mask[length:, :length] = text < probe_positions(length, ratio, device)[:, None]
    mask[length:, length:] = torch.eye(probes, dtype=torch.bool, device=device)
    return mask


def causal_mask(num_rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return bool [N, N], True on and below the diagonal: probes appended to the text see it and each other."""
    row = torch.arange(num_rows, device=device)
    return row[:, None] >= row
