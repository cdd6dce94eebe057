"""Which keys each query sees, cut into blocks that kernels without a mask compute.

Every query sees an interval of keys. Where neither end falls, and both move by 0 or 1 from one query to the next, the
seen part is made of rectangles and of triangles: a causal square (a query sees the keys up to its own place) or its
mirror image (from its own place on). Equal blocks at equal steps are one piece, and one call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["all", "until", "from"]


@dataclass(frozen=True)
class Piece:
    """`count` blocks of `queries` x `keys` tokens; block b begins at query_start + b * query_step, keys alike.

    Attributes:
        kind: query t of a block sees "all" keys of it, those "until" key t, or those "from" key t on (both inclusive).
    """

    kind: Kind
    query_start: int
    queries: int
    key_start: int
    keys: int
    count: int = 1
    query_step: int = 0
    key_step: int = 0


def cut_intervals(start: NDArray[np.int64], stop: NDArray[np.int64]) -> list[Piece]:
    """Return pieces that hold every (query t, key j) with start[t] <= j < stop[t] exactly once.

    Args:
        start, stop: int64 [n]; neither falls from one query to the next.
    """
    pieces: list[Piece] = []
    number, total = 0, len(start)
    steps = np.stack([np.diff(start), np.diff(stop)], 1)
    changes = np.flatnonzero((steps[1:] != steps[:-1]).any(1)) + 1 if total > 2 else np.empty(0, np.int64)
    while number < total:
        if start[number] >= stop[number]:
            seen = np.flatnonzero(start[number:] < stop[number:])
            number = number + int(seen[0]) if len(seen) else total
            continue
        last, step = number, (0, 0)
        if number + 1 < total and steps[number].max() <= 1:
            step = (int(steps[number][0]), int(steps[number][1]))
            beyond = changes[np.searchsorted(changes, number + 1) :]
            last = int(beyond[0]) if len(beyond) else total - 1
            if step == (1, 0):  # the interval shrinks; queries that see nothing are no part of it
                last = min(last, number + int(stop[number] - start[number]) - 1)
        pieces += _cut_run(number, last - number + 1, int(start[number]), int(stop[number]), step)
        number = last + 1
    return _grouped([piece for piece in pieces if piece.queries and piece.keys])


def _cut_run(first: int, count: int, start: int, stop: int, step: tuple[int, int]) -> list[Piece]:
    """Cut `count` queries of which the first sees start .. stop - 1 and each next one's ends move by `step`."""
    if step == (0, 0):
        return [Piece("all", first, count, start, stop - start)]
    if step == (0, 1):
        return [Piece("all", first, count, start, stop - 1 - start), Piece("until", first, count, stop - 1, count)]
    if step == (1, 0):
        rest = Piece("all", first, count, start + count, stop - start - count)
        return [Piece("from", first, count, start, count), rest]
    width = stop - start
    if count > width:  # a window that moves: blocks of its width
        blocks = count // width
        pieces = [
            Piece("from", first, width, start, width, blocks, width, width),
            Piece("until", first + 1, width - 1, stop, width - 1, blocks, width, width),
        ]
        done = blocks * width
        return pieces + (_cut_run(first + done, count - done, start + done, stop + done, step) if count > done else [])
    return [
        Piece("from", first, count, start, count),
        Piece("all", first, count, start + count, width - count),
        Piece("until", first + 1, count - 1, stop, count - 1),
    ]


def _grouped(pieces: list[Piece]) -> list[Piece]:
    """Join single blocks of one form that follow each other at equal steps into one piece."""
    joined: dict[tuple[str, int, int], list[Piece]] = {}
    for piece in pieces:
        same = joined.setdefault((piece.kind, piece.queries, piece.keys), [])
        before = same[-1] if same else None
        if before is not None and piece.count == 1:
            steps = (
                piece.query_start - before.query_start - (before.count - 1) * before.query_step,
                piece.key_start - before.key_start - (before.count - 1) * before.key_step,
            )
            fits = before.count == 1 or steps == (before.query_step, before.key_step)
            if fits and steps[0] >= piece.queries and steps[1] >= piece.keys:  # blocks must not overlap
                same[-1] = replace(before, count=before.count + 1, query_step=steps[0], key_step=steps[1])
                continue
        same.append(piece)
    return [piece for same in joined.values() for piece in same]
