"""short keys: the smaller the norm, the more attention.

The L2 norm of keys (arXiv 2406.11430). It looks at no query, so nothing is read for it.
"""

from __future__ import annotations

import torch

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen


class Knorm(KVPolicy):
    """Minus the norm of the key."""

    reference = "L2 norm of keys, arXiv 2406.11430"
    needs_queries = False

    def score(self, seen: Seen) -> torch.Tensor:
        """Return minus the norm."""
        norms: torch.Tensor = torch.linalg.vector_norm(seen.text_keys, dim=-1)
        return -norms


KV_POLICIES.register("knorm", Knorm)
