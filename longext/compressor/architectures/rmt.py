"""one memory handed on, read in front and written behind; one adapted model.

Recurrent Memory Transformer (arXiv 2207.06881): a fixed number of vectors is handed from segment to segment.
"""

from __future__ import annotations

import torch

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.base import RecurrentCompressor
from longext.compressor.memory import Memory, num_slots
from longext.compressor.segments import Segment


class RMT(RecurrentCompressor):
    """[sink | memory | segment | memory]; last hidden states of the trailing copy are the next segment's memory."""

    reference = "RMT, arXiv 2207.06881 and 2304.11062"
    reads_last = True

    def run(self, segment: Segment, memory: Memory, first_slot: int) -> tuple[torch.Tensor, Memory]:
        """Run the segment between two copies of the memory."""
        return self.run_with(segment, memory, self._state(memory, segment.ratio, len(segment.tokens)))

    def prefix_rows(self, sink: torch.Tensor, memory: Memory, ratio: int) -> torch.Tensor:
        """Return sink and memory; the trained vectors if there is none yet."""
        return torch.cat([self.embed(sink), self._state(memory, ratio, len(sink))], 1)

    def _state(self, memory: Memory, ratio: int, batch: int) -> torch.Tensor:
        return memory[0] if num_slots(memory) else self.rows(self.vectors[: self.slots(ratio)], batch)


COMPRESSORS.register("rmt", RMT)
