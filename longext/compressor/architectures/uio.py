"""LoRA encoder, prefix probes, LoRA transfer head on k and v; frozen reader.

UIO-LLMs (arXiv 2406.18173, section 3): a LoRA encoder, and a LoRA transfer head that makes the reader's KV.
"""

from __future__ import annotations

import torch
from torch import nn

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.independent import IndependentCompressor
from longext.compressor.spec import CompressorSpec


class UIO(IndependentCompressor):
    """One trained vector, repeated, reads a prefix of the segment per slot; what attention sees there is remembered."""

    reference = "UIO-LLMs, arXiv 2406.18173"
    encoder, transfer, nested = "encoder", "transfer", True

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        self.vector = nn.Parameter(self.initial_vectors(1))
        # what the last layer's attention would add is never read, so its encoder adapter would get no gradient
        self.adapters.add("encoder", "qv", len(backbone.attentions) - 1)
        self.adapters.add("transfer", "kv")

    def probes(self, count: int) -> torch.Tensor:
        """Return the one vector `count` times."""
        return self.vector.expand(count, -1)


COMPRESSORS.register("uio", UIO)
