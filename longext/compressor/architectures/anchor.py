"""as uio, with probes that start as copies of every ratio-th token.

UIO whose probes start as copies of the tokens at their positions (longext's own variant).

The released probe is one trained vector, so before training a slot holds keys that the frozen reader has never seen.
Here probe i is the last token of its stretch, seen as that token sees the text: before training the memory is the raw
KV cache with every `ratio`-th token kept, and training teaches the encoder to put the tokens between into it.
"""

from __future__ import annotations

import torch
from torch import nn

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.independent import IndependentCompressor, prefix_mask, probe_positions
from longext.compressor.spec import CompressorSpec


class Anchor(IndependentCompressor):
    """UIO's encoder, mask and transfer head; a probe's input is its token's embedding plus one trained vector."""

    reference = "longext; after UIO-LLMs, arXiv 2406.18173"
    encoder, transfer, nested = "encoder", "transfer", True

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        self.vector = nn.Parameter(torch.zeros_like(self.repeat)[None])
        self.adapters.add("encoder", "qv", len(backbone.attentions) - 1)
        self.adapters.add("transfer", "kv")

    def _inputs(self, tokens: torch.Tensor, ratio: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, length = tokens.shape
        places = probe_positions(length, ratio, tokens.device) - 1
        text = self.embed(tokens)
        probes = text[:, places] + self.rows(self.vector, batch)
        mask = prefix_mask(length, ratio, tokens.device)
        mask[length + torch.arange(len(places), device=tokens.device), places] = False  # the probe replaces that token
        positions = torch.cat([torch.arange(length, device=tokens.device), places])
        return torch.cat([text, probes], 1), positions, mask


COMPRESSORS.register("anchor", Anchor)
