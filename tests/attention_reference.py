"""Attention by its definition in float64 with an N x N mask: what every kernel is compared with."""

from __future__ import annotations

import torch

# how the lower and the upper half of the heads are masked, by the name of the variant
DEFINITIONS = {
    "full": ("dense", "dense"),
    "s2": ("plain", "shifted"),
    "s2-wrapped": ("plain", "wrapped"),
    "short": ("plain", "plain"),
}
LAYOUTS = [(4, 4), (4, 2), (4, 1), (6, 2), (8, 2), (6, 3), (5, 1), (5, 5), (14, 2), (9, 3), (1, 1)]


def group_of(position: int, length: int, kind: str, group_size: int) -> int:
    """The number of the piece that a position of a segment belongs to."""
    if kind == "dense" or length <= group_size:
        return 0
    if kind == "shifted":
        return (position + group_size - group_size // 2) // group_size
    return position // group_size


def segment_mask(length: int, kind: str, group_size: int) -> torch.Tensor:
    """bool [length, length], True where a query (row) sees a key, for one segment."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            if kind == "wrapped" and length > group_size:
                a, b = ((x - group_size // 2) % length for x in (q, k))
                mask[q, k] = a // group_size == b // group_size and b <= a
            else:
                same = group_of(q, length, kind, group_size) == group_of(k, length, kind, group_size)
                mask[q, k] = same and k <= q
    return mask


def row_mask(ids: list[int], kind: str, group_size: int) -> torch.Tensor:
    """bool [N, N] of one row; `ids` gives each token's segment, -1 for padding (sees nothing)."""
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for segment in set(ids) - {-1}:
        positions = torch.tensor([i for i, s in enumerate(ids) if s == segment])
        mask[positions[:, None], positions] = segment_mask(len(positions), kind, group_size)
    return mask


def reference(q, k, v, rows, kinds, group_size, scale, softcap=None, window=None):
    """q [B, H, N, D], k, v [B, K, N, D]; rows: segment ids per row; kinds: (lower half, upper half) -> [B, N, H, D]."""
    q, k, v = (x.double() for x in (q, k, v))
    heads, length = q.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    half = heads // 2
    masks = [[row_mask(ids, kind, group_size) for kind in kinds] for ids in rows]
    mask = torch.stack([torch.stack([m[0]] * half + [m[1]] * (heads - half)) for m in masks])
    if window is not None:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = mask & (distance < window)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)
