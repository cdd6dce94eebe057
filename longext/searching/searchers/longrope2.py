"""LongRoPE2's evolution from NTK seeds around the critical pair, on the loss of hidden numbers."""

from __future__ import annotations

import numpy as np

from longext.searching.searcher import SEARCHERS, Ask, Candidate, Searcher, Space
from longext.searching.searchers._evolution import Array, Evolution, evolve

SIZES = Evolution()
_NTK_SEEDS = 8


def bounds(space: Space) -> tuple[Array, Array]:
    """Return the least and largest factors: [1, s + 5] below the critical pair, [s, length scale] from it on.

    The critical pair is the code's default, the theoretical one - 1; the length scale is 64 at s = 16 to 32 and 4 s
    or 2 s outside of that.
    """
    s, before = space.factor, np.arange(space.num_pairs) < space.critical_pair - 1
    length_scale = max(2 * s, min(4 * s, 64.0))
    return np.where(before, 1.0, s), np.where(before, s + 5, length_scale)


def ntk_seeds(space: Space) -> list[Array]:
    """Return 8 seeds with scale z = s (1 + 3 i / 32), at s = 32 the paper's 32 + 3 i.

    lambda_j = z^(j / cd) below the critical pair, then z + 0.1 j.
    """
    pairs, cd = np.arange(space.num_pairs), max(1, space.critical_pair - 1)
    scales = [space.factor * (1 + 3 * i / 32) for i in range(_NTK_SEEDS)]
    return [np.where(pairs < cd, z ** (pairs / cd), z + 0.1 * pairs) for z in scales]


def search(space: Space, ask: Ask) -> Candidate:
    """Return the best of the evolution."""
    return evolve(SIZES, space, ask, ntk_seeds(space), *bounds(space))


SEARCHERS.register(
    "longrope2",
    Searcher(
        title="LongRoPE2",
        reference="arXiv 2502.20082",
        evaluations=SIZES.evaluations,
        search=search,
        weights="needle",
    ),
)
