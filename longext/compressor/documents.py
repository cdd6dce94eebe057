"""From token rows to the segments a compressor works on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longext.compressor.base import REPEAT, CompressorSpec, Segment
from longext.training.losses import IGNORED, shift


def split_segments(
    tokens: torch.Tensor, labels: torch.Tensor, spec: CompressorSpec, ratios: Sequence[int]
) -> list[Segment]:
    """Cut documents into segments of l tokens (the last may be shorter).

    The label of a segment's last token is the first token of the next: no token is left unscored at a boundary.

    Args:
        tokens, labels: int64 [B, N], not shifted; -100 where nothing is scored.
        ratios: of each segment's memory.
    """
    aligned = shift(labels)
    length = spec.segment
    starts = range(0, tokens.shape[1], length)
    return [
        Segment(
            tokens=tokens[:, start : start + length],
            labels=aligned[:, start : start + length],
            before=tokens[:, max(0, start - spec.overlap) : start],
            sink=tokens[:, : spec.sink if start else 0],
            ratio=ratio,
        )
        for start, ratio in zip(starts, ratios, strict=False)
    ]


def reconstruction_segments(tokens: torch.Tensor, ratio: int, sink: int) -> list[Segment]:
    """Return the two segments of auto-encoding: a text, and the repeat token that asks for it (ICAE, arXiv 2307.06945).

    Args:
        tokens: int64 [B, l].
    """
    nothing = tokens[:, :0]
    asked = torch.cat([torch.full_like(tokens[:, :1], REPEAT), tokens[:, :-1]], 1)
    labels = tokens.clone()
    labels[:, :sink] = IGNORED  # those stay readable as they are
    text = Segment(tokens, torch.full_like(tokens, IGNORED), nothing, nothing, ratio)
    return [text, Segment(asked, labels, nothing, tokens[:, :sink], ratio)]
