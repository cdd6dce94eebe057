"""From rows of tokens to the segments that a compressor works on.

Shape legend: B documents, N tokens of a document, l of a segment, o of the overlap, s of the sink, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longext.compressor.spec import CompressorSpec
from longext.training.losses import IGNORED, shift

REPEAT = -1  # the token id of the trained "repeat the text" vector (auto-encoding)


@dataclass
class Segment:
    """One segment of B documents.

    Attributes:
        tokens: int64 [B, l].
        labels: int64 [B, l], aligned (label p belongs to the output at p), -100 if nothing is scored.
        before: int64 [B, o], the raw tokens that stay readable before it.
        sink: int64 [B, s], the first tokens of the documents; empty for segment 0, which holds them itself.
        ratio: of the memory it writes.
        teacher: last hidden states [B, l, D] to imitate, or None.
        weights: of cross-entropy and of the divergence from the teacher.
        label_weights: [B, l], what multiplies each label's cross-entropy, or None.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    before: torch.Tensor
    sink: torch.Tensor
    ratio: int
    teacher: torch.Tensor | None = None
    weights: tuple[float, float] = (1.0, 0.0)
    label_weights: torch.Tensor | None = None


def split_segments(
    tokens: torch.Tensor, labels: torch.Tensor, spec: CompressorSpec, ratios: Sequence[int]
) -> list[Segment]:
    """Cut documents into segments of l tokens (the last may be shorter).

    The label of a segment's last token is the first token of the next: no token is left unscored at a boundary.

    Args:
        tokens, labels: int64 [B, N], not shifted; -100 if nothing is scored.
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
    asking = torch.cat([torch.full_like(tokens[:, :1], REPEAT), tokens[:, :-1]], 1)
    labels = tokens.clone()
    labels[:, :sink] = IGNORED  # those stay readable as they are
    text = Segment(tokens, torch.full_like(tokens, IGNORED), nothing, nothing, ratio)
    return [text, Segment(asking, labels, nothing, tokens[:, :sink], ratio)]
