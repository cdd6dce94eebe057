"""control: a trained constant prefix of the same size, blind to the text.

A control, not a memory: trained keys and values of the same size that know nothing of the text.

What it gains over no memory is what prefix tuning alone gains; only what a memory gains over it is remembered text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.independent import IndependentCompressor
from longext.compressor.memory import Memory
from longext.compressor.segments import Segment
from longext.compressor.spec import CompressorSpec


class ConstantPrefix(IndependentCompressor):
    """The same trained input vectors for every segment, run through the frozen model's projections (prefix tuning)."""

    reference = "prefix tuning, arXiv 2101.00190"

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        vocabulary = backbone.embedding.weight.shape[0]
        tokens = torch.randint(vocabulary, (1, self.slots(min(spec.ratios))), device=backbone.device)
        with torch.no_grad():  # starts as some text would: keys the reader has seen the like of
            captured = backbone.attention_inputs(backbone.embed(tokens), slice(None))
        self.states = nn.Parameter(torch.cat(captured.hidden).to(self.repeat.dtype))

    def write_batch(self, segments: Sequence[Segment], first_slots: Sequence[int]) -> list[Memory]:
        """Return the constant of every segment."""
        return [self.write(segment, (), slot) for segment, slot in zip(segments, first_slots, strict=True)]

    def encode(self, tokens: torch.Tensor, ratio: int, first_slots: torch.Tensor) -> Memory:
        """Return the constant, rotated to the slots of each segment."""
        count = tokens.shape[1] // ratio
        with torch.no_grad():
            captured = self.backbone.attention_inputs(self.embed(tokens[:, :1]), slice(None))
        captured.hidden = [self.rows(states[:count], len(tokens)) for states in self.states]
        slots = first_slots[:, None] + torch.arange(count)
        return self.backbone.project(captured, slots.to(tokens.device))


COMPRESSORS.register("prefix", ConstantPrefix)
