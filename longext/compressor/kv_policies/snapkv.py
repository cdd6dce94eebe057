"""attention of the last 64 queries, smoothed over five keys; the 64 themselves stay.

SnapKV (arXiv 2404.14469). Where the budget is below 256 the window is a quarter of it; snapkv:N+M has one of M. As
snapkv-aware the queries are those of the end of the prompt, read behind every chunk, and no key stays for being new.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen

WINDOW, KERNEL = 64, 5


class SnapKV(KVPolicy):
    """Mean attention of a window of queries, averaged over neighbours and over the query heads of a group."""

    reference = "SnapKV, arXiv 2404.14469"
    can_ask = True

    def num_last(self, budget: int) -> int:
        """Return the window."""
        return 0 if self.aware else max(1, min(WINDOW, budget // 4))

    def score(self, seen: Seen) -> torch.Tensor:
        """Return the smoothed attention; keys of the window itself stay out of it."""
        last = min(self.stays(seen.budget), seen.num_keys - 1)
        count = min(WINDOW if self.aware else max(1, last), seen.queries.shape[-2])
        window = seen.total_attention(count)[..., : seen.num_keys - last] / count
        pooled = F.avg_pool1d(window.flatten(1, 2), KERNEL, stride=1, padding=KERNEL // 2)
        found = pooled.unflatten(1, window.shape[1:3]).mean(2)
        return torch.cat([found, found.new_zeros(*found.shape[:-1], last)], -1)


KV_POLICIES.register("snapkv", SnapKV)
