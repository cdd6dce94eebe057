"""LoRA encoder, distinct causal slots; soft vectors (or their KV) for the frozen reader.

ICAE (arXiv 2307.06945): memory slots with vectors of their own, soft; or their keys and values (500xCompressor).
"""

from __future__ import annotations

import torch
from torch import nn

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.independent import IndependentCompressor
from longext.compressor.spec import CompressorSpec


class ICAE(IndependentCompressor):
    """LoRA encoder with distinct causal slots; a slot's last hidden state is an input vector of the frozen reader.

    `memory="kv"` keeps the slots' keys and values of every layer instead (500xCompressor, arXiv 2408.03094), made at
    the positions they are read at.
    """

    reference = "ICAE, arXiv 2307.06945; with kv memory 500xCompressor, arXiv 2408.03094"
    encoder, transfer = "encoder", "encoder"
    memories = ("soft", "kv")

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        count = self.slots(min(spec.ratios))
        table = backbone.embedding.weight.detach().float()
        vectors = self.initial_vectors(count)
        self.vectors = nn.Parameter(vectors + torch.randn_like(vectors) * table.std())
        if self.is_soft:
            self.adapters.add("encoder", "qv")
        else:  # the last layer's attention is not read, so its queries would get no gradient
            self.adapters.add("encoder", "q", len(backbone.attentions) - 1)
            self.adapters.add("encoder", "kv")

    def probes(self, count: int) -> torch.Tensor:
        """Return the first `count` vectors."""
        return self.vectors[:count]


COMPRESSORS.register("icae", ICAE)
