"""Intervals: a seeded bootstrap for means, Wilson's score interval for accuracy, and means of several of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # two-sided 95 %
MIN_DOCUMENTS = 8  # fewer are no sample to draw from: windows are resampled then


def wilson_interval(num_correct: float, num_trials: int) -> tuple[float, float]:
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


def share_interval(scores: Any, num_samples: int = 1000) -> tuple[float, float]:
    """Return the 95 % interval of a mean of shares: Wilson's where all are 0 or 1, else a seeded bootstrap.

    Equal shares would give a bootstrap of no width: Wilson's interval of their mean then stands for it.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(set(values.tolist())) > 1 and not np.isin(values, (0, 1)).all():
        found = bootstrap_mean(values, np.ones_like(values), num_samples=num_samples, seed=0)
        assert found is not None
        return found
    return wilson_interval(values.sum(), len(values))


def stderr_interval(value: float, stderr: float | None, count: int | None) -> tuple[float, float] | None:
    """Return the 95 % interval of a number with a standard error: value -+ 1.96 of it; None without one.

    At 0 or 1 with no spread a share has Wilson's interval instead (over `count` trials; none where that is not known):
    equal answers say little of the next one.
    """
    if stderr is None:
        return None
    if stderr == 0:
        return wilson_interval(value * count, count) if count and value in (0, 1) else None
    return value - _Z * stderr, value + _Z * stderr


def mean_interval(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of independent estimates (value, low, high).

    The distances to the bounds add up in squares (MOVER: Zou and Donner, 2008), so an estimate without spread but with
    an interval widens it.
    """
    count = len(estimates)
    mean = sum(value for value, _, _ in estimates) / count
    below = math.sqrt(sum((value - low) ** 2 for value, low, _ in estimates)) / count
    above = math.sqrt(sum((high - value) ** 2 for value, _, high in estimates)) / count
    return mean - below, mean + above


def student_quantile(share: float, freedom: int) -> float:
    """Return the quantile of Student's t at `share` > 0.5: exact for 2 degrees of freedom, else within 1.5 % at 0.9975.

    The expansion of Abramowitz and Stegun, 26.7.5, for 3 and more.
    """
    if freedom == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    z: float = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, 1)))


def paired_interval(differences: Any, num_looks: float = 1) -> tuple[float, float]:
    """Return the interval of the mean of paired differences by Student's t: 95 % over all of `num_looks` looks at it.

    Who looks again and again as data come in divides the 5 % by the number of looks (Bonferroni).

    Args:
        differences: float64 [n], n >= 3.
    """
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    assert count >= 3, "too few pairs for the quantile"
    half = student_quantile(1 - 0.025 / num_looks, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()) - half, float(values.mean()) + half


def sign_test(num_better: int, num_worse: int) -> float:
    """Return the two-sided p-value that pairs which differ fall as unevenly by chance (exact McNemar, 1947)."""
    total = num_better + num_worse
    tail = sum(math.comb(total, k) for k in range(min(num_better, num_worse) + 1))
    return min(1.0, 2.0 * tail / 2.0**total)


Estimate = tuple[float, tuple[float, float] | None]  # a number and its 95 % interval


def leaders(
    estimates: Sequence[Estimate], *, lower_is_better: bool, exact: bool = False
) -> tuple[int | None, frozenset[int]]:
    """Return which estimate is the best, None if no one is told apart from all others, and those that share the lead.

    Two are told apart if their intervals do not meet. If all share the lead, or one has no interval, nothing is said
    of any.

    Args:
        exact: the numbers are no samples: those without an interval are told apart if they differ.
    """
    if len(estimates) < 2 or not (exact or all(interval for _, interval in estimates)):
        return None, frozenset()
    values = [value for value, _ in estimates]
    first = values.index(min(values) if lower_is_better else max(values))
    tied = frozenset(i for i, own in enumerate(estimates) if i == first or not _are_apart(own, estimates[first]))
    if len(tied) == 1:
        return first, frozenset()
    return None, tied if len(tied) < len(estimates) else frozenset()


def _are_apart(one: Estimate, other: Estimate) -> bool:
    (value, interval), (other_value, other_interval) = one, other
    if interval is None or other_interval is None:
        return value != other_value
    return interval[1] < other_interval[0] or other_interval[1] < interval[0]
