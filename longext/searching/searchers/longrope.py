"""LongRoPE's evolution from PI, NTK and YaRN, on plain perplexity."""

from __future__ import annotations

import numpy as np

from longext.searching.searcher import SEARCHERS, Ask, Candidate, Searcher, Space
from longext.searching.searchers._evolution import Array, Evolution, evolve

SIZES = Evolution(population=64)


def seeds(space: Space) -> list[Array]:
    """Return the factors of position interpolation, of the NTK-aware base and of YaRN."""
    pairs, s = np.arange(space.num_pairs), space.factor
    return [np.full(space.num_pairs, s), s ** (pairs / max(1, space.num_pairs - 1)), np.array(space.yarn.factors)]


def search(space: Space, ask: Ask) -> Candidate:
    """Return the best of the evolution; factors lie in [1, 1.25 s]."""
    low, high = np.ones(space.num_pairs), np.full(space.num_pairs, 1.25 * space.factor)
    return evolve(SIZES, space, ask, seeds(space), low, high)


SEARCHERS.register(
    "longrope",
    Searcher(
        title="LongRoPE",
        reference="arXiv 2402.13753",
        evaluations=SIZES.evaluations,
        search=search,
        weights="text",
    ),
)
