"""summary vectors accumulate; one adapted model reads and writes in one pass.

AutoCompressor (arXiv 2305.14788): summary vectors accumulate, and every segment reads and re-encodes all of them.
"""

from __future__ import annotations

import torch

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.base import RecurrentCompressor
from longext.compressor.memory import Memory
from longext.compressor.segments import Segment


class AutoCompressor(RecurrentCompressor):
    """[sink | summaries of all segments before | segment | summary tokens]; last hidden states of these are kept."""

    reference = "AutoCompressor, arXiv 2305.14788"

    def run(self, segment: Segment, memory: Memory, first_slot: int) -> tuple[torch.Tensor, Memory]:
        """Run the segment with the summary tokens behind it."""
        vectors = self.vectors[: self.slots(segment.ratio)]
        return self.run_with(segment, memory, self.rows(vectors, len(segment.tokens)))


COMPRESSORS.register("autocompressor", AutoCompressor)
