"""Evolution of monotone factors, as LongRoPE and LongRoPE2 search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longext.searching.searcher import Ask, Candidate, Space

Array = NDArray[np.float64]
_GRID = 0.01
_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """Sizes and rates of an evolution; the defaults are LongRoPE2's."""

    population: int = 128
    generations: int = 40
    parents: int = 32
    mutations: int = 16
    crossovers: int = 16
    mutated: float = 0.3
    crossed: float = 0.15

    @property
    def evaluations(self) -> int:
        """How many candidates a whole run tries."""
        return self.population + self.generations * (self.mutations + self.crossovers)


def is_allowed(factors: Array, low: Array, high: Array) -> bool:
    """True for factors that do not decrease and lie within their bounds."""
    inside = (factors >= low - 1e-9).all() and (factors <= high + 1e-9).all()
    return bool(inside and (np.diff(factors) >= -1e-9).all())


def fit(factors: Array, low: Array, high: Array) -> Array:
    """Return `factors` on the grid, within bounds, made not to decrease."""
    return np.maximum.accumulate(np.round(np.clip(factors, low, high) / _GRID) * _GRID).clip(low, high)


def mutate(factors: Array, low: Array, high: Array, rate: float, rng: np.random.Generator) -> Array:
    """Return a copy in which each pair is redrawn, with probability `rate`, on the grid between its neighbours."""
    changed: Array = factors.copy()
    for i in np.flatnonzero(rng.random(len(factors)) < rate):
        least = max(low[i], changed[i - 1] if i else low[i])
        most = min(high[i], changed[i + 1] if i + 1 < len(changed) else high[i])
        steps = int(np.floor((most - least) / _GRID + 1e-9))
        changed[i] = least + _GRID * rng.integers(0, steps + 1) if steps > 0 else changed[i]
    return changed


def cross(factors: Array, other: Array, rate: float, rng: np.random.Generator) -> Array:
    """Return a copy that takes each pair of `other` with probability `rate`, if it stays monotone."""
    changed: Array = factors.copy()
    for i in np.flatnonzero(rng.random(len(factors)) < rate):
        is_above = i == 0 or other[i] >= changed[i - 1]
        is_below = i + 1 == len(changed) or other[i] <= changed[i + 1]
        changed[i] = other[i] if is_above and is_below else changed[i]
    return changed


def evolve(sizes: Evolution, space: Space, ask: Ask, seeds: Sequence[Array], low: Array, high: Array) -> Candidate:
    """Return the best of a population that starts with `seeds` and mutations of them, for the space's evaluations.

    No candidate is tried twice; a generation keeps the best `parents` of all that were tried.
    """
    rng = np.random.default_rng([space.seed, sizes.population])
    scored: list[tuple[float, Array]] = []
    seen: set[tuple[float, ...]] = set()

    def attempt(make: list[Array]) -> None:
        for factors in make:
            key = tuple(factors.round(2).tolist())
            if key in seen or len(seen) >= space.evaluations or not is_allowed(factors, low, high):
                continue
            seen.add(key)
            scored.append((ask(Candidate(key, space.su_temperature), space.num_samples), factors.round(2)))
            return

    for seed in seeds[: sizes.population]:
        attempt([fit(seed, low, high)])
    first = [factors for _, factors in scored]
    while len(scored) < min(sizes.population, space.evaluations):
        chosen = [first[i] for i in rng.integers(0, len(first), _TRIES)]
        before = len(scored)
        attempt([mutate(each, low, high, sizes.mutated, rng) for each in chosen])
        if len(scored) == before:
            break
        first.append(scored[-1][1])
    each = sizes.mutations + sizes.crossovers
    for _ in range(max(sizes.generations, -(-(space.evaluations - sizes.population) // each))):
        scored.sort(key=lambda pair: pair[0])
        parents = [factors for _, factors in scored[: sizes.parents]]
        for _ in range(sizes.mutations):
            chosen = [parents[i] for i in rng.integers(0, len(parents), _TRIES)]
            attempt([mutate(each, low, high, sizes.mutated, rng) for each in chosen])
        for _ in range(sizes.crossovers):
            pairs = [(parents[i], parents[j]) for i, j in rng.integers(0, len(parents), (_TRIES, 2))]
            attempt([cross(one, other, sizes.crossed, rng) for one, other in pairs])
        if len(seen) >= space.evaluations:
            break
    best = min(scored, key=lambda pair: pair[0])[1]
    return Candidate(tuple(best.round(2).tolist()), space.su_temperature)
