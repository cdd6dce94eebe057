"""Recurrent Memory Transformer (arXiv 2207.06881): a fixed number of vectors is handed from segment to segment."""

from __future__ import annotations

import sys

import torch
from torch import nn

from longext.compressor.backbone import Backbone
from longext.compressor.base import COMPRESSORS, Compressor, CompressorSpec, Segment
from longext.compressor.memory import Memory, num_slots


class RMT(Compressor):
    """[sink | memory | segment | memory]; last hidden states of the trailing copy are the next segment's memory."""

    summary = "one memory handed on, read in front and written behind; one adapted model"
    reference = "RMT, arXiv 2207.06881 and 2304.11062"
    recurrent = joint = reads_last = trains_reader = True
    memories = ("soft",)
    reader = "model"

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        self.vectors = nn.Parameter(self.initial_vectors(self.slots(min(spec.ratios))))
        self.adapters.add("model", "qkvo")

    @classmethod
    def max_segments(cls, spec: CompressorSpec, window: int, ratio: int) -> int:
        """Return 0 where a segment between two copies of the memory does not fit, else no limit."""
        needed = spec.sink + 2 * (spec.segment // ratio) + spec.overlap + spec.segment
        return sys.maxsize if needed <= window else 0

    def step(
        self, segment: Segment, memory: Memory, first_slot: int, *, loss: bool, write: bool
    ) -> tuple[torch.Tensor | None, Memory | None]:
        """Read and write in one forward pass."""
        hidden, made = self._pass(segment, memory, write)
        return self.loss(hidden, segment) if loss else None, made

    def write(self, segment: Segment, memory: Memory, first_slot: int) -> Memory:
        """Write without scoring."""
        made = self._pass(segment, memory, True)[1]
        assert made is not None
        return made

    def prefix_rows(self, sink: torch.Tensor, memory: Memory, ratio: int) -> torch.Tensor:
        """Return sink and memory; the trained vectors where there is none yet."""
        return torch.cat([self.embed(sink), self._state(memory, ratio, len(sink))], 1)

    def _state(self, memory: Memory, ratio: int, batch: int) -> torch.Tensor:
        return memory[0] if num_slots(memory) else self.rows(self.vectors[: self.slots(ratio)], batch)

    def _pass(self, segment: Segment, memory: Memory, write: bool) -> tuple[torch.Tensor, Memory | None]:
        length = segment.tokens.shape[1]
        state = self._state(memory, segment.ratio, len(segment.tokens))
        tokens = self.embed(torch.cat([segment.before, segment.tokens], 1))
        parts = [self.embed(segment.sink), state, tokens, *([state] if write else [])]
        with self.reading():
            hidden = self.backbone.run(torch.cat(parts, 1))
        end = hidden.shape[1] - (state.shape[1] if write else 0)
        return hidden[:, end - length : end], (hidden[:, end:],) if write else None


COMPRESSORS.register("rmt", RMT)
