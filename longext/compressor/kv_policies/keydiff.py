"""keys unlike the others: least cosine with the mean direction.

KeyDiff (arXiv 2504.15364), over the rotated keys that are there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen


class KeyDiff(KVPolicy):
    """Minus the cosine between a key and the mean of the normalised keys of its head."""

    reference = "KeyDiff, arXiv 2504.15364"
    needs_queries = False

    def score(self, seen: Seen) -> torch.Tensor:
        """Return minus the cosine."""
        directions = F.normalize(seen.text_keys, dim=-1)
        there = (seen.origins >= 0)[..., None].to(directions.dtype)
        mean = (directions * there).sum(-2, keepdim=True) / there.sum(-2, keepdim=True)
        return -F.cosine_similarity(directions, mean, dim=-1)


KV_POLICIES.register("keydiff", KeyDiff)
