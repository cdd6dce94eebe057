"""the first tokens and the newest.

StreamingLLM (arXiv 2309.17453); without first tokens, the segment recurrence of Transformer-XL (arXiv 1901.02860) with
keys and values for its hidden states.
"""

from __future__ import annotations

import torch

from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.reading.seen import KVPolicy, Seen


class Streaming(KVPolicy):
    """The first `num_sinks` tokens and, since the newest score highest, the last of the others."""

    reference = "StreamingLLM, arXiv 2309.17453"
    needs_queries = False

    def __init__(self, aware: bool = False, num_sinks: int = 4) -> None:
        super().__init__(aware)
        self.num_sinks = num_sinks

    def num_first(self) -> int:
        """Return the sinks."""
        return self.num_sinks

    def score(self, seen: Seen) -> torch.Tensor:
        """Return minus the age of the token: exact in float32 for all that are young enough to stay."""
        return (seen.origins - seen.num_read).to(torch.float32)


KV_POLICIES.register("streaming", Streaming)
