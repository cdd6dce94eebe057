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
        """Return minus the cosine, without copies of all keys."""
        keys = seen.text_keys
        norms = torch.linalg.vector_norm(keys, dim=-1).clamp(min=torch.finfo(keys.dtype).tiny)
        share = (seen.origins >= 0).to(keys.dtype) / norms
        mean = F.normalize(share[..., None, :] @ keys, dim=-1)  # its direction: its length does not matter
        cosine: torch.Tensor = (keys @ mean.transpose(-1, -2))[..., 0] / norms
        return -cosine


KV_POLICIES.register("keydiff", KeyDiff)
