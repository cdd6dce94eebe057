"""Which memories a segment reads, at which ratios and positions: [sink | memories | overlap | segment].

Training, sessions, readers, evaluations and the checks of sizes all ask here; nothing else knows what a segment reads.

Ratios by distance (a fading memory): the newest memory has the first ratio, the two before it the second, the four
before those the third, and so on; all further ones have the last. One ratio is the same for all. Memories beyond the
window make room in one of two ways. "forget": the oldest leave. "thin": of those at the last ratio, the run of equal
ratio with most slots has its older half brought to twice its ratio, until all fit; where no ratio can be doubled (it
must divide l) the oldest leave. Ratios only ever grow, so a memory is thinned by a stride and never written again.

Shape legend: l tokens of a segment, l / ratio slots of a memory; segments and memories are numbered from 0.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longext.compressor.base import Compressor
    from longext.compressor.spec import CompressorSpec

UNLIMITED = sys.maxsize
WHEN_FULL = ("thin", "forget", "refuse")

Ratio = int | tuple[int, ...]  # one for all memories, or several by distance
Runs = tuple[tuple[int, int], ...]  # (ratio, how many memories in a row), the oldest first


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What each segment of a text reads of the segments before it.

    Attributes:
        segment: l.
        ratios: of the memories, in order or by distance; the last one is that of all further memories.
        by_distance: which of the two.
        sink: raw tokens of the text's start that stay readable.
        fixed: slots in front of the memories: the sink's keys and values; 0 if memories are soft.
        overlap: raw tokens before a segment that stay readable.
        room: most slots that a segment reads.
        capacity: most memories that a segment reads.
        block: memories that leave together once there are more.
        thins: far memories are thinned out before any leaves.
        hands_on: a memory takes the place of the one before it, however long the text is.
    """

    segment: int
    ratios: tuple[int, ...]
    by_distance: bool = False
    sink: int
    fixed: int
    overlap: int
    room: int = UNLIMITED
    capacity: int = UNLIMITED
    block: int = 1
    thins: bool = False
    hands_on: bool = False

    @staticmethod
    def of(
        kind: type[Compressor],
        spec: CompressorSpec,
        ratios: int | Sequence[int],
        window: int | None = None,
        *,
        by_distance: bool = True,
        parts: int | None = None,
        thins: bool = False,
    ) -> Schedule:
        """Return the schedule of an architecture.

        Args:
            ratios: of the memories, one for all, or several by distance.
            window: positions that the model has; None if nothing leaves (a training document fits by its length).
            by_distance: False if `ratios` are those of the memories in order.
            parts: how many of the memories leave together: one in so many; None for one by one.
            thins: memories are thinned out before any leaves (architectures whose ratios nest).
        """
        ratios = (ratios,) if isinstance(ratios, int) else tuple(ratios)
        room = capacity = UNLIMITED
        if window is not None:
            room = window - spec.sink - spec.overlap - spec.segment
            room -= spec.segment // ratios[0] if kind.appends else 0
            smallest = _coarsest(spec.segment, ratios[-1]) if thins else ratios[-1]
            capacity = _most(max(0, room), spec.segment, ratios, smallest)
        if kind.reads_last:
            capacity, parts = min(1, capacity), None
        return Schedule(
            segment=spec.segment,
            ratios=ratios,
            by_distance=by_distance,
            sink=spec.sink,
            fixed=0 if spec.memory == "soft" else spec.sink,
            overlap=spec.overlap,
            room=room,
            capacity=capacity,
            block=max(1, -(-capacity // parts)) if parts else 1,
            thins=thins and window is not None,
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
        """Return the slots of one memory as it is written."""
        return self.segment // self.written_at(memory)

    def written_at(self, memory: int) -> int:
        """Return the ratio of one memory before any other comes behind it."""
        return self.ratios[0 if self.by_distance else min(memory, len(self.ratios) - 1)]

    def visible(self, reader: int) -> int:
        """Return how many memories segment `reader` would read if all fit: those not wholly inside the overlap."""
        return max(0, reader + 1 - self.first_reader)

    def first(self, reader: int) -> int:
        """Return the oldest memory that has not left when segment `reader` reads."""
        if self.thins:
            return self._tail(self.visible(reader) - _head(self.ratios))[0]
        excess = max(0, self.visible(reader) - self.capacity)
        return -(-excess // self.block) * self.block

    def span(self, reader: int) -> tuple[int, int]:
        """Return the memories first .. last - 1 that segment `reader` reads."""
        return self.first(reader), self.visible(reader)

    def ratios_at(self, reader: int) -> list[int]:
        """Return the ratios of the memories that segment `reader` reads, the oldest first."""
        first, last = self.span(reader)
        if not self.by_distance:
            return [self.written_at(memory) for memory in range(first, last)]
        near = min(last - first, _head(self.ratios))
        tail = self._tail(last - near)[1] if self.thins else ((self.ratios[-1], last - first - near),)
        far = [ratio for ratio, count in tail for _ in range(count)]
        return [*far, *(_at_distance(self.ratios, distance) for distance in range(near - 1, -1, -1))]

    def is_thinned(self, reader: int) -> bool:
        """True if segment `reader` reads a memory at a higher ratio than its distance gives it."""
        return self.thins and max(self.ratios_at(reader), default=0) > self.ratios[-1]

    def writer_span(self, segment: int) -> tuple[int, int]:
        """Return the memories that a recurrent architecture reads while it writes that of `segment`.

        If memories leave in blocks they do so before the new one is written, so that its keys stay where they are.
        """
        return self.first(segment + 1 if self.block > 1 else segment), self.visible(segment)

    def places(self, ratios: Iterable[int]) -> list[int]:
        """Return the position of the first slot of memories of such ratios in a row, and where the next would be."""
        return list(itertools.accumulate((self.segment // ratio for ratio in ratios), initial=self.fixed))

    def place(self, memory: int) -> int:
        """Return the position of the first slot of a memory if none has left: the same for all readers."""
        return self.places(self.written_at(s) for s in range(memory))[-1]

    def num_slots(self, reader: int) -> int:
        """Return the slots of all memories that segment `reader` reads."""
        return self.places(self.ratios_at(reader))[-1] - self.fixed

    def num_readable(self, reader: int) -> int:
        """Return the positions in front of segment `reader`: sink, slots and overlap."""
        return self.sink + self.num_slots(reader) + min(self.overlap, reader * self.segment) if reader else 0

    # --- thinning: runs of memories at the last ratio of the schedule or above ----------------------------------------

    @functools.cached_property
    def _tails(self) -> list[tuple[int, Runs]]:
        return [(0, ())]

    def _tail(self, count: int) -> tuple[int, Runs]:
        """Return (how many have left, runs of the others) once `count` memories are far."""
        while len(self._tails) <= count:
            self._tails.append(self._with_one_more(*self._tails[-1]))
        return self._tails[max(0, count)]

    def _with_one_more(self, gone: int, runs: Runs) -> tuple[int, Runs]:
        """Let one more memory become a far one, and make room for it."""
        near = sum(self.segment // _at_distance(self.ratios, d) for d in range(_head(self.ratios)))
        runs = _merged([*runs, (self.ratios[-1], 1)])
        while runs and self._size(runs) > self.room - near:
            thinner = [i for i, (ratio, _) in enumerate(runs) if self.segment % (2 * ratio) == 0]
            if thinner:
                i = max(thinner, key=lambda i: self._size(runs[i : i + 1]))
                ratio, count = runs[i]
                parts = [(2 * ratio, count - count // 2), (ratio, count // 2)]
                runs = _merged([*runs[:i], *parts, *runs[i + 1 :]])
            else:
                leaving = min(self.block, runs[0][1])
                gone += leaving
                runs = _merged([(runs[0][0], runs[0][1] - leaving), *runs[1:]])
        return gone, runs

    def _size(self, runs: Runs) -> int:
        return sum(self.segment // ratio * count for ratio, count in runs)


def kept_slots(segment: int, held: Iterable[int], wanted: Iterable[int]) -> list[int]:
    """Return which slots of memories in a row at the ratios `held` they have at the ratios `wanted`, no smaller ones.

    A slot stands for the stretch of tokens that ends with it, so the last of each longer stretch stays.
    """
    kept: list[int] = []
    start = 0
    for ratio, new in zip(held, wanted, strict=False):
        stride, end = new // ratio, start + segment // ratio
        kept += range(start + stride - 1, end, stride)
        start = end
    return kept


def spelled(ratio: Ratio) -> str:
    """Return a ratio, or several by distance, as `--memory OUT@2,4,8` takes them."""
    return ",".join(map(str, (ratio,) if isinstance(ratio, int) else ratio))


def _at_distance(ratios: Sequence[int], distance: int) -> int:
    """Return the ratio of the memory that has `distance` newer ones: 1, 2, 4, ... memories at each ratio."""
    return ratios[min((distance + 1).bit_length(), len(ratios)) - 1]


def _head(ratios: Sequence[int]) -> int:
    """Return how many of the newest memories have not the last ratio."""
    return int(2 ** (len(ratios) - 1)) - 1


def _coarsest(segment: int, ratio: int) -> int:
    while segment % (2 * ratio) == 0:
        ratio *= 2
    return ratio


def _most(room: int, segment: int, ratios: Sequence[int], last: int) -> int:
    """Return how many memories fit `room` slots, far ones at the ratio `last`."""
    sizes = [segment // _at_distance(ratios, distance) for distance in range(_head(ratios))]
    if sum(sizes) <= room:
        return len(sizes) + (room - sum(sizes)) // (segment // last)
    return sum(total <= room for total in itertools.accumulate(sizes))


def _merged(runs: Iterable[tuple[int, int]]) -> Runs:
    """Return runs without empty ones, neighbours of equal ratio as one."""
    groups = itertools.groupby((run for run in runs if run[1]), key=lambda run: run[0])
    return tuple((ratio, sum(count for _, count in group)) for ratio, group in groups)
