"""attention that future queries are expected to give, times the norm of the value.

ExpectedAttention (arXiv 2510.00636): the mean m and covariance C of the queries before rotation, of all tokens read so
far, are turned to the average of the next 512 positions (those left in the window, if fewer); a key k scores
exp(m k / sqrt d + k C k / 2d), normalised over the keys, averaged over the query heads of a group, times |v|. The
first four tokens stay.
"""

from __future__ import annotations

import torch

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen, wide

HORIZON, SINKS = 512, 4


class ExpectedAttention(KVPolicy):
    """The expectation of exp(q k / sqrt d) for normally distributed queries."""

    reference = "ExpectedAttention, arXiv 2510.00636"

    def num_first(self) -> int:
        """Return the sinks."""
        return SINKS

    def score(self, seen: Seen) -> torch.Tensor:
        """Return the expected attention times the norm of the value."""
        end = seen.first + seen.num_keys
        count = seen.queries.shape[-2]
        plain = seen.turn(wide(seen.queries), -torch.arange(end - count, end))
        notes = {"sum": plain.sum(-2), "square": plain.transpose(-1, -2) @ plain, "count": plain.new_tensor(count)}
        for name, value in notes.items():
            seen.notes[name] = seen.notes[name] + value if name in seen.notes else value
        mean = seen.notes["sum"] / seen.notes["count"]
        covariance = seen.notes["square"] / seen.notes["count"] - mean[..., :, None] * mean[..., None, :]
        future = torch.arange(end, end + max(1, min(HORIZON, seen.window - seen.budget)))
        average = self._average(seen, mean, future)
        mean = mean @ average
        covariance = average.mT @ covariance @ average
        keys = seen.text_keys[:, :, None]
        logits = (keys @ mean[..., None])[..., 0] * seen.scale
        logits = logits + ((keys @ covariance) * keys).sum(-1) * seen.scale**2 / 2
        if seen.bias is not None:
            logits = logits + wide(seen.bias)[:, :, None]
        norms: torch.Tensor = torch.linalg.vector_norm(wide(seen.values[..., : seen.num_keys, :]), dim=-1)
        return logits.softmax(-1).mean(2) * norms

    def _average(self, seen: Seen, like: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        """Return A [d, d]: q A is the average of a row q turned to each position of `future` (a turn is linear)."""
        size = like.shape[-1]
        rows = torch.eye(size, dtype=like.dtype, device=like.device).repeat(len(future), 1)
        turned = seen.turn(rows[None], future.repeat_interleave(size))
        return turned.reshape(-1, size, size).mean(0)


KV_POLICIES.register("expected", ExpectedAttention)
