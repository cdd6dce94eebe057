"""keys, weights and values that give the same attention outputs, in closed form.

Attention Matching (arXiv 2602.16284). For reference queries Q, those of reading each chunk again right behind itself:
keys stay by the root mean square of their attention; a weight w >= 0 of each key fits the sum of exp scores,
exp(Q K_kept') w ~ exp(Q K') 1 (each row divided by its largest term), and is kept as a bias ln w; new values C fit the
outputs, softmax(Q K_kept' + ln w) C ~ softmax(Q K') V. There are fewer queries than keys, so that both fits take the
solution nearest to what is there (w = 1, C = V): least squares with a small ridge towards it. w is clamped to
[e^-3, e^7] and improved by two projected gradient steps. Held weights take part in all sums, since chunk after chunk
is compacted. As attention-matching-aware Q is the end of the prompt.
"""

from __future__ import annotations

import torch

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen, wide

RIDGE = 1e-2  # of the mean diagonal of the normal equations
LOWEST, HIGHEST, STEPS = -3.0, 7.0, 2


class AttentionMatching(KVPolicy):
    """Chooses by attention, then fits biases and values."""

    reference = "Attention Matching, arXiv 2602.16284"
    repeats = can_ask = True

    def score(self, seen: Seen) -> torch.Tensor:
        """Return the root mean square of the attention over queries and the query heads of a group."""
        return (seen.total_attention(power=2).mean(2) / seen.queries.shape[-2]).sqrt()

    def fit(self, seen: Seen, index: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and biases of the keys that stay."""
        scores = seen.scores()[..., : seen.num_keys].flatten(2, 3)  # of a head: [B, H, G q, n]
        values = wide(seen.values[..., : seen.num_keys, :])
        top = scores.amax(-1, keepdim=True)
        exp = (scores - top).exp()
        held = torch.zeros_like(exp[:, :, 0]) if seen.bias is None else wide(seen.bias)[..., : seen.num_keys]
        of_rows = index[:, :, None].expand(-1, -1, exp.shape[2], -1)
        start = held.gather(-1, index).exp().masked_fill(~there, 1.0)
        bare = exp.gather(-1, of_rows).masked_fill(~there[:, :, None], 0.0) / start[:, :, None]
        weights = self._weights(bare, exp.sum(-1, keepdim=True), start)
        attention = bare * weights[:, :, None]
        attention = attention / attention.sum(-1, keepdim=True)
        target = exp @ values / exp.sum(-1, keepdim=True)
        kept = values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))
        return nearest_solution(attention, target, kept), weights.log()

    def _weights(self, exp: torch.Tensor, total: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        low, high = torch.tensor([LOWEST, HIGHEST], dtype=exp.dtype).exp().tolist()
        weights = nearest_solution(exp, total, start[..., None]).clamp(low, high)
        step = 1 / exp.square().sum((-1, -2), keepdim=True)  # at most 1 / the largest eigenvalue
        for _ in range(STEPS):
            gradient = exp.transpose(-1, -2) @ (exp @ weights - total)
            weights = (weights - step * gradient).clamp(low, high)
        fitted: torch.Tensor = weights[..., 0]
        return fitted


def nearest_solution(matrix: torch.Tensor, target: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return X that minimises |matrix X - target|^2 + ridge |X - start|^2 (batched).

    Args:
        matrix: [..., q, m], columns of zeros for what is not there; target: [..., q, d]; start: [..., m, d].
    """
    count = (matrix != 0).any(-2).sum(-1)[..., None, None].clamp(1, matrix.shape[-2])
    size = matrix.square().sum((-1, -2), keepdim=True) / count
    # the dual form: q equations instead of m
    gram = matrix @ matrix.transpose(-1, -2)
    ridge = RIDGE * size.clamp(min=torch.finfo(matrix.dtype).tiny)
    gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    found: torch.Tensor = start + matrix.transpose(-1, -2) @ torch.linalg.solve(gram, target - matrix @ start)
    return found


KV_POLICIES.register("attention-matching", AttentionMatching)
