"""Recurrent Memory Transformer (arXiv 2207.06881): a fixed number of vectors is handed from segment to segment."""

from __future__ import annotations

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

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        self.vectors = nn.Parameter(self.initial_vectors(self.slots(min(spec.ratios))))
        self.adapters.add("model", "qkvo")

    def step(
        self, segment: Segment, memory: Memory, first_slot: int, *, loss: bool, write: bool
    ) -> tuple[torch.Tensor | None, Memory | None]:
        """Read and write in one forward pass."""
        hidden, made = self._pass(segment, memory, write)
        return self.loss(hidden, segment) if loss else None, made

    def read(self, segment: Segment, memory: Memory) -> torch.Tensor:
        """Score without writing."""
        return self._pass(segment, memory, False)[0]

    def write(self, segment: Segment, memory: Memory, first_slot: int) -> Memory:
        """Write without scoring."""
        made = self._pass(segment, memory, True)[1]
        assert made is not None
        return made

    def _pass(self, segment: Segment, memory: Memory, write: bool) -> tuple[torch.Tensor, Memory | None]:
        batch, length = segment.tokens.shape
        state = memory[0] if num_slots(memory) else self.rows(self.vectors[: self.slots(segment.ratio)], batch)
        tokens = self.embed(torch.cat([segment.before, segment.tokens], 1))
        parts = [self.embed(segment.sink), state, tokens, *([state] if write else [])]
        with self.adapters.use("model"):
            hidden = self.backbone.run(torch.cat(parts, 1))
        end = hidden.shape[1] - (state.shape[1] if write else 0)
        return hidden[:, end - length : end], (hidden[:, end:],) if write else None


COMPRESSORS.register("rmt", RMT)
