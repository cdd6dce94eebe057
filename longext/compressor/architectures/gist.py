"""one adapted model writes and reads; keys and values of causal gist tokens.

Gist tokens (arXiv 2304.08467): the model learns to leave a text's content in the keys and values of a few tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.independent import IndependentCompressor
from longext.compressor.spec import CompressorSpec


class Gist(IndependentCompressor):
    """One new token, repeated, causal; one adapter both writes and reads. Each segment's gists see that segment alone.

    The paper trains all weights; here a LoRA on q, k, v and o replaces them.
    """

    reference = "Gist tokens, arXiv 2304.08467"
    encoder = transfer = reader = "model"
    trains_reader = True

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        mean = backbone.embedding.weight.detach().float().mean(0, keepdim=True)
        self.vector = nn.Parameter(mean.to(self.repeat.dtype))
        self.adapters.add("model", "qkvo")

    def probes(self, count: int) -> torch.Tensor:
        """Return the one vector `count` times."""
        return self.vector.expand(count, -1)


COMPRESSORS.register("gist", Gist)
