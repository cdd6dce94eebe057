"""the most attention that any query gives while the text is read again.

KVzip (arXiv 2505.23416). Each chunk is read a second time right behind itself (without a sentence that asks for it, so
that models without a chat format can); a key keeps the score that its own chunk gave it, or a later one if higher.
"""

from __future__ import annotations

from functools import reduce

import torch

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen


class KVzip(KVPolicy):
    """The largest attention over the queries of the second reading and the query heads of a group."""

    reference = "KVzip, arXiv 2505.23416"
    repeats = True

    def score(self, seen: Seen) -> torch.Tensor:
        """Return the largest attention so far."""
        found = reduce(torch.maximum, (part.amax((2, 3)) for part in seen.attention()))
        if "most" in seen.kept:
            found = torch.maximum(found, seen.kept["most"])
        seen.kept["most"] = found
        return found


KV_POLICIES.register("kvzip", KVzip)
