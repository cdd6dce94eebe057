"""Intervals: a seeded bootstrap for perplexity and Wilson's score interval for accuracy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # two-sided 95 %


def wilson_interval(num_correct: int, num_trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) without trials."""
    if num_trials == 0:
        return 0.0, 1.0
    p, n = num_correct / num_trials, num_trials
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    sums: NDArray[np.float64], counts: NDArray[np.float64], *, num_samples: int, seed: int
) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of sum(sums) / sum(counts), resampling units with replacement.

    Args:
        sums: total NLL per unit (document or window), float64 [units].
        counts: tokens per unit, float64 [units].

    Returns:
        (low, high), or None where there is nothing to resample (one unit, no samples).
    """
    if num_samples < 1 or len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(sums), (num_samples, len(sums)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
