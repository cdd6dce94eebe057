"""AutoCompressor (arXiv 2305.14788): summary vectors accumulate, and every segment reads and re-encodes all of them."""

from __future__ import annotations

import torch
from torch import nn

from longext.compressor.backbone import Backbone
from longext.compressor.base import COMPRESSORS, Compressor, CompressorSpec, Segment
from longext.compressor.memory import Memory


class AutoCompressor(Compressor):
    """[sink | summaries of all segments before | segment | summary tokens]; last hidden states of these are kept."""

    summary = "summary vectors accumulate; one adapted model reads and writes in one pass"
    reference = "AutoCompressor, arXiv 2305.14788"
    recurrent = joint = trains_reader = True
    memories = ("soft",)
    reader = "model"

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        self.vectors = nn.Parameter(self.initial_vectors(self.slots(min(spec.ratios))))
        self.adapters.add("model", "qkvo")

    @classmethod
    def max_segments(cls, spec: CompressorSpec, window: int, ratio: int) -> int:
        """Return the most segments: the summary tokens that are written need positions too."""
        return spec.max_segments(window - spec.segment // ratio, ratio)

    def step(
        self, segment: Segment, memory: Memory, first_slot: int, *, loss: bool, write: bool
    ) -> tuple[torch.Tensor | None, Memory | None]:
        """Read and write in one forward pass; the summary tokens come last, so that the loss does not know of them."""
        hidden, made = self._pass(segment, memory, write)
        return self.loss(hidden, segment) if loss else None, made

    def write(self, segment: Segment, memory: Memory, first_slot: int) -> Memory:
        """Write without scoring."""
        made = self._pass(segment, memory, True)[1]
        assert made is not None
        return made

    def _pass(self, segment: Segment, memory: Memory, write: bool) -> tuple[torch.Tensor, Memory | None]:
        batch, length = segment.tokens.shape
        tokens = self.embed(torch.cat([segment.before, segment.tokens], 1))
        count = self.slots(segment.ratio) if write else 0
        prefix = self.prefix_rows(segment.sink, memory, segment.ratio)
        parts = [prefix, tokens, self.rows(self.vectors[:count], batch)]
        with self.reading():
            hidden = self.backbone.run(torch.cat(parts, 1))
        end = hidden.shape[1] - count
        return hidden[:, end - length : end], (hidden[:, end:],) if write else None


COMPRESSORS.register("autocompressor", AutoCompressor)
