"""attention received so far, per query that could see the key; half of the budget for the newest.

H2O, heavy hitters (arXiv 2306.14048); the sum divided by the number of queries, as kvpress' observed attention has it.
"""

from __future__ import annotations

import torch

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen


class H2O(KVPolicy):
    """Column sums of the attention of every query of the text so far, averaged over the query heads of a group."""

    reference = "H2O, arXiv 2306.14048"

    def num_last(self, budget: int) -> int:
        """Return half of the budget."""
        return budget // 2

    def score(self, seen: Seen) -> torch.Tensor:
        """Return the mean attention of the queries that could see each key."""
        received = seen.total_attention().mean(2)
        total = received + seen.kept.get("sum", 0.0)
        seen.kept["sum"] = total
        return total / (seen.num_read - seen.origins).clamp(min=1)


KV_POLICIES.register("h2o", H2O)
