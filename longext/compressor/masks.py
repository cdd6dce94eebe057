"""Which rows of an encoder pass see which: text rows, and the probes that read them into memory.

Shape legend: L text tokens of a segment, K probes (memory slots), M memory slots before them, N = rows.
"""

from __future__ import annotations

import torch


def probe_positions(length: int, ratio: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the RoPE positions of the K = length / ratio probes, int64 [K]: probe i at (i + 1) ratio.

    It shares the position of the next text token (UIO-LLMs, arXiv 2406.18173, released code), so that the probes of
    ratio 2c are every second probe of ratio c.
    """
    return torch.arange(ratio, length + 1, ratio, device=device)


def prefix_mask(length: int, ratio: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return bool [L + K, L + K], True where row sees column: causal text; probe i the text before (i + 1) ratio.

    Text never sees a probe, and a probe sees no other, so each is a read-out of a prefix, whatever the others are.
    """
    probes = length // ratio
    mask = torch.zeros(length + probes, length + probes, dtype=torch.bool, device=device)
    text = torch.arange(length, device=device)
    mask[:length, :length] = text[:, None] >= text
    mask[length:, :length] = text < probe_positions(length, ratio, device)[:, None]
    mask[length:, length:] = torch.eye(probes, dtype=torch.bool, device=device)
    return mask


def causal_mask(num_rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return bool [N, N], True on and below the diagonal: probes appended to the text see it and each other."""
    row = torch.arange(num_rows, device=device)
    return row[:, None] >= row


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


def after_memory(mask: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Return bool [N, M + N]: `mask` [N, N] with M memory slots in front, which every row sees."""
    seen = torch.ones(mask.shape[0], num_slots, dtype=torch.bool, device=mask.device)
    return torch.cat([seen, mask], 1)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [1, 1, N, C] of 0 and the dtype's lowest value: what every attention of transformers adds to scores."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)[None, None]
