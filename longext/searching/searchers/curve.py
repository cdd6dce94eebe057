"""A curve of four numbers: critical pair, slope, plateau and temperature.

lambda_i = p^(min(1, i / c)^k): 1 at the fastest pair, the plateau p from the critical pair c on. k = 1 is LongRoPE2's
NTK-like seed, k = 2.5 nearly YaRN's ramp, a large k a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longext.searching.searcher import SEARCHERS, Ask, Candidate, Searcher, Space

NAMES = ("critical_pair", "slope", "plateau", "temperature")
_FIRST = 0.4  # share of the evaluations that a low-discrepancy sequence spreads over the space
_ELITE = 4  # best candidates that the next ones are drawn around
_GENERATION = 6
_NARROWEST = 0.04  # smallest deviation of a draw, as a share of the space
_TOLERANCE = 1.15  # a candidate is dropped if it is this much worse than the best on the first samples


def curve(num_pairs: int, critical_pair: float, slope: float, plateau: float) -> tuple[float, ...]:
    """Return lambda_i = plateau^(min(1, i / critical_pair)^slope), `num_pairs` of them; not decreasing."""
    share = np.minimum(1.0, np.arange(num_pairs) / critical_pair)
    return tuple(float(value) for value in plateau**share**slope)


def bounds(space: Space) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the lowest and highest (critical pair, slope, ln plateau, temperature)."""
    c, s = space.critical_pair, space.factor
    temperatures = (1 + 0.05 * math.log(s), 1 + 0.16 * math.log(s))  # YaRN's is 1 + 0.1 ln s
    most = min(temperatures[1], space.most_temperature)
    low = np.array([0.6 * c, 1.0, math.log(0.75 * s), min(temperatures[0], (1 + most) / 2)])
    return low, np.array([min(1.4 * c, space.num_pairs), 5.0, math.log(2 * s), most])


def candidate_at(space: Space, share: Sequence[float] | NDArray[np.float64]) -> Candidate:
    """Return the candidate at a place of the unit cube, rounded to what a reader can type."""
    low, high = bounds(space)
    c, k, log_p, a = (low + np.asarray(share) * (high - low)).tolist()
    rounded = [round(c, 2), round(k, 3), round(max(1.0, math.exp(log_p)), 3), round(a, 4)]
    point = dict(zip(NAMES, rounded, strict=True))
    return Candidate(curve(space.num_pairs, *rounded[:3]), point["temperature"], point)


def first_samples(space: Space) -> int:
    """Return how many samples, three of eight, decide whether a candidate is tried on the rest."""
    return max(2, math.ceil(3 * space.num_samples / 8))


def search(space: Space, ask: Ask) -> Candidate:
    """Spread candidates over the space, then draw around the best ones (a cross-entropy method), racing each.

    All first candidates see three of eight samples; the best of them and whatever keeps up with the best later see all.
    """
    from torch.quasirandom import SobolEngine

    rng = np.random.default_rng([space.seed, 4])
    few, num_first = first_samples(space), max(2, int(_FIRST * space.evaluations))
    sequence = SobolEngine(4, scramble=True, seed=space.seed % 2**31).draw(num_first).double().numpy()
    draws = [*_near_yarn(space), *sequence][:num_first]
    spread = sorted(draws, key=lambda place: ask(candidate_at(space, place), few))
    scored = [(ask(candidate_at(space, place), space.num_samples), place) for place in spread[: 2 * _ELITE - 2]]
    tried = num_first
    while tried < space.evaluations:
        scored.sort(key=lambda pair: pair[0])
        elite = np.array([place for _, place in scored[:_ELITE]])
        deviation = np.maximum(elite.std(0), _NARROWEST)
        limit = _TOLERANCE * ask(candidate_at(space, scored[0][1]), few)
        for _ in range(min(_GENERATION, space.evaluations - tried)):
            place = np.clip(rng.normal(elite.mean(0), deviation), 0, 1)
            tried += 1
            if ask(candidate_at(space, place), few) <= limit:
                scored.append((ask(candidate_at(space, place), space.num_samples), place))
    return candidate_at(space, min(scored, key=lambda pair: pair[0])[1])


def _near_yarn(space: Space) -> list[NDArray[np.float64]]:
    """Two starts: the curve nearest to YaRN's ramp, as it is and with a steeper slope."""
    low, high = bounds(space)
    starts = [[space.critical_pair, k, math.log(space.factor), space.yarn.attention_factor] for k in (2.5, 3.5)]
    return [((np.array(start) - low) / (high - low).clip(1e-9)).clip(0, 1) for start in starts]


def num_windows(space: Space) -> int:
    """Return about how many windows a search takes: half of the later candidates are dropped early."""
    few, first = first_samples(space), int(_FIRST * space.evaluations)
    rest = space.num_samples - few
    return space.evaluations * few + (2 * _ELITE - 2) * rest + (space.evaluations - first) * rest // 2


SEARCHERS.register(
    "curve",
    Searcher(
        title="curve of four numbers",
        reference="longext; the plateau and its critical pair are LongRoPE2's (arXiv 2502.20082)",
        evaluations=64,
        search=search,
        windows=num_windows,
    ),
)
