"""attention of the last query, the mean of all heads.

TOVA (arXiv 2401.06104): all heads of a layer keep the same tokens. As tova-aware the query is the last of the prompt.
"""

from __future__ import annotations

import torch

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen


class TOVA(KVPolicy):
    """Mean attention of all query heads of the layer for the last token, which itself stays."""

    reference = "TOVA, arXiv 2401.06104"
    can_ask = True

    def num_last(self, budget: int) -> int:
        """Return the last token."""
        return 0 if self.aware else 1

    def score(self, seen: Seen) -> torch.Tensor:
        """Return the attention of the last query, the same for all heads."""
        found = seen.total_attention(1).mean((1, 2))
        return found[:, None].expand(-1, seen.keys.shape[1], -1)


KV_POLICIES.register("tova", TOVA)
