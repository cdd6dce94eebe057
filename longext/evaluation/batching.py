"""Cut a list of work into batches that can share a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def batched_by(items: Sequence[T], size: int, key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Yield runs of consecutive items with equal `key`, at most `size` long, in order."""
    for _, run in itertools.groupby(items, key):
        while batch := list(itertools.islice(run, size)):
            yield batch
