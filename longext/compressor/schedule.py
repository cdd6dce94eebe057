"""Which memories a segment reads, and at which positions: [sink | memories | overlap | segment].

Training, sessions, readers, evaluations and the checks of sizes all ask here, so that another schedule (ratios that
grow with the distance, memories that are thinned out) is written here and nowhere else. That is why the questions name
the segment that reads: today its number decides only which memories have left.

Shape legend: l tokens of a segment, k = l / ratio slots of its memory; segments and memories are numbered from 0.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longext.compressor.base import Compressor
    from longext.compressor.spec import CompressorSpec

UNLIMITED = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What each segment of a text reads of the segments before it: the newest memories that fit.

    Attributes:
        segment: l.
        ratios: of the memories in order; the last one is that of all further memories.
        sink: raw tokens of the text's start that stay readable.
        fixed: slots in front of the memories: the sink's keys and values; 0 if memories are soft.
        overlap: raw tokens before a segment that stay readable.
        capacity: most memories that a segment reads.
        block: memories that leave together once there are more.
        hands_on: a memory takes the place of the one before it, however long the text is.
    """

    segment: int
    ratios: tuple[int, ...]
    sink: int
    fixed: int
    overlap: int
    capacity: int = UNLIMITED
    block: int = 1
    hands_on: bool = False

    @staticmethod
    def of(
        kind: type[Compressor],
        spec: CompressorSpec,
        ratios: int | Sequence[int],
        window: int | None = None,
        parts: int | None = None,
    ) -> Schedule:
        """Return the schedule of an architecture.

        Args:
            ratios: of the memories, one for all or one for each.
            window: positions that the model has; None if nothing leaves (a training document fits by its length).
            parts: how many of the memories leave together: one in so many; None for one by one.
        """
        ratios = (ratios,) if isinstance(ratios, int) else tuple(ratios)
        capacity = UNLIMITED
        if window is not None:
            slots = spec.segment // ratios[0]
            room = window - spec.sink - spec.overlap - spec.segment - (slots if kind.appends else 0)
            capacity = max(0, room // slots)
        if kind.reads_last:
            capacity, parts = min(1, capacity), None
        return Schedule(
            segment=spec.segment,
            ratios=ratios,
            sink=spec.sink,
            fixed=0 if spec.memory == "soft" else spec.sink,
            overlap=spec.overlap,
            capacity=capacity,
            block=max(1, -(-capacity // parts)) if parts else 1,
            hands_on=kind.reads_last,
        )

    @property
    def first_reader(self) -> int:
        """The number of the first segment that reads a memory."""
        return 1 + self.overlap // self.segment

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text with a token whose prediction reads a memory."""
        return self.first_reader * self.segment + 2

    @property
    def max_segments(self) -> int:
        """Most segments of a text of which no memory leaves."""
        return UNLIMITED if self.hands_on and self.capacity else self.capacity + self.first_reader

    def slots(self, memory: int) -> int:
        """Return k of one memory."""
        return self.segment // self.ratios[min(memory, len(self.ratios) - 1)]

    def visible(self, reader: int) -> int:
        """Return how many memories segment `reader` would read if all fit: those not wholly inside the overlap."""
        return max(0, reader + 1 - self.first_reader)

    def first(self, reader: int) -> int:
        """Return the oldest memory that has not left when segment `reader` reads."""
        excess = max(0, self.visible(reader) - self.capacity)
        return -(-excess // self.block) * self.block

    def span(self, reader: int) -> tuple[int, int]:
        """Return the memories first .. last - 1 that segment `reader` reads."""
        return self.first(reader), self.visible(reader)

    def writer_span(self, segment: int) -> tuple[int, int]:
        """Return the memories that a recurrent architecture reads while it writes that of `segment`.

        If memories leave in blocks they do so before the new one is written, so that its keys stay where they are.
        """
        return self.first(segment + 1 if self.block > 1 else segment), self.visible(segment)

    def places(self, first: int, last: int) -> list[int]:
        """Return the position of the first slot of memories first .. last, for a segment that reads from `first` on."""
        return list(itertools.accumulate((self.slots(s) for s in range(first, last)), initial=self.fixed))

    def num_slots(self, reader: int) -> int:
        """Return the slots of all memories that segment `reader` reads."""
        return self.places(*self.span(reader))[-1] - self.fixed

    def num_readable(self, reader: int) -> int:
        """Return the positions in front of segment `reader`: sink, slots and overlap."""
        return self.sink + self.num_slots(reader) + min(self.overlap, reader * self.segment) if reader else 0
