"""beacons among the tokens with their own q, k, v adapters; recurrent through depth.

Activation Beacon (arXiv 2401.03462): beacons among the raw tokens, with projections of their own, keep KV.
"""

from __future__ import annotations

import torch
from torch import nn

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.base import JointCompressor
from longext.compressor.independent import causal_mask, probe_positions
from longext.compressor.memory import Memory, num_slots
from longext.compressor.segments import Segment
from longext.compressor.spec import CompressorSpec


class Beacon(JointCompressor):
    """One beacon after every `ratio` raw tokens; beacon rows run with their own adapters on q, k and v.

    Beacons see all memories before, the raw tokens before them and one another. Raw tokens run as the frozen model and
    do not see the beacons of their own segment, so a segment's loss is the same whether it is being compressed or not.
    The paper trains full copies of the projections; here a LoRA replaces them.
    """

    reference = "Activation Beacon, arXiv 2401.03462 v3"
    recurrent = True

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        self.vector = nn.Parameter(self.initial_vectors(1))
        # what the last layer's attention gives beacons is not read, so its queries would get no gradient
        self.adapters.add("beacon", "q", len(backbone.attentions) - 1)
        self.adapters.add("beacon", "kv")

    def run(self, segment: Segment, memory: Memory, first_slot: int) -> tuple[torch.Tensor, Memory]:
        """Run the segment with beacons at the positions that they reach to, and project their keys to their slots."""
        batch, length = segment.tokens.shape
        device, before = segment.tokens.device, segment.before.shape[1]
        count = self.slots(segment.ratio)
        tokens = self.embed(torch.cat([segment.before, segment.tokens], 1))
        embeds = torch.cat([tokens, self.rows(self.vector.expand(count, -1), batch)], 1)
        reach = before + probe_positions(length, segment.ratio, device)
        positions = num_slots(memory) + torch.cat([torch.arange(before + length, device=device), reach])
        beacons = torch.arange(before + length, before + length + count, device=device)
        mask = beacon_mask(length, segment.ratio, before, device)
        with self.adapters.use("beacon", rows=beacons):
            rows = slice(before + length, None)
            hidden, captured = self.backbone.run_and_capture(embeds, rows, positions, memory, mask)
        with self.adapters.use("beacon"):
            slots = torch.arange(first_slot, first_slot + count, device=device)[None]
            memory_states = self.backbone.project(captured, slots)
        return hidden[:, before : before + length], memory_states


def beacon_mask(length: int, ratio: int, before: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return bool [N, N] for N = before + L + K rows [raw tokens | K beacons].

    Raw rows are causal among themselves and see no beacon of their own segment. Beacon i sees the raw rows before
    (i + 1) ratio and the beacons up to itself, as if it stood among them (Activation Beacon, arXiv 2401.03462).
    """
    raw, beacons = before + length, length // ratio
    mask = torch.zeros(raw + beacons, raw + beacons, dtype=torch.bool, device=device)
    mask[:raw, :raw] = causal_mask(raw, device)
    reach = before + probe_positions(length, ratio, device)
    mask[raw:, :raw] = torch.arange(raw, device=device) < reach[:, None]
    mask[raw:, raw:] = causal_mask(beacons, device)
    return mask


COMPRESSORS.register("beacon", Beacon)
