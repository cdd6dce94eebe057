"""Dual chunk attention: positions within a chunk, of the chunk before, and one distance for all older chunks."""

from longext.attention.bands import REMAPS, Band, Numbers, RemapMethod, RemapSpec
from longext.rope.spec import Parameter


def _bands(s: RemapSpec) -> list[Band]:
    size = s.chunk - s.window  # S, at which keys start over
    oldest = min(2 * size - 1, s.chunk)

    def first(i: Numbers) -> Numbers:  # of the query's chunk
        return i - i % size

    return [
        Band(first, lambda i: i + 1, lambda i: i % size, lambda j: j % size),
        Band(lambda i: first(i) - size, first, lambda i: (i % size + size).clip(max=s.chunk), lambda j: j % size),
        Band(lambda i: i * 0, lambda i: first(i) - size, lambda i: i * 0 + oldest, lambda j: j % size),
    ]


REMAPS.register(
    "dca",
    RemapMethod(
        title="DCA",
        reference="arXiv 2402.17463",
        formula="keys at j mod S, S = c - w; queries at i mod S, min(i mod S + S, c), min(2 S - 1, c) by age of chunk",
        parameters=(
            Parameter("chunk", "chunk size c: the largest distance", least=2),
            Parameter("window", "distances up to w stay as they are across chunks too", least=1),
        ),
        defaults=lambda L, N, pairs, given: {
            "chunk": (c := given.get("chunk") or max(2, L * 3 // 4)),
            "window": max(1, c // 6),  # L / 8 of the default chunk
        },
        bands=_bands,
        exact=lambda s: s.chunk - s.window,
        colour="#117733",
        trains=True,
    ),
)
