"""Intervals against published values and against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest

from longext.evaluation.statistics import bootstrap_mean, wilson_interval


@pytest.mark.parametrize(
    ("correct", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_matches_newcombe_1998(correct, trials, low, high):
    assert wilson_interval(correct, trials) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_without_trials_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_is_seeded_and_covers_the_mean():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, 40).astype(float)
    sums = counts * rng.normal(3, 0.5, 40)
    interval = bootstrap_mean(sums, counts, num_samples=2000, seed=1)
    assert interval is not None
    low, high = interval
    mean = sums.sum() / counts.sum()
    assert low < mean < high
    assert (low, high) == bootstrap_mean(sums, counts, num_samples=2000, seed=1)
    # the width of a mean's interval is 2 x 1.96 standard errors
    weights = counts / counts.sum()
    error = np.sqrt((weights**2 * (sums / counts - mean) ** 2).sum())
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_one_unit_has_no_interval():
    assert bootstrap_mean(np.array([6.0]), np.array([2.0]), num_samples=10, seed=0) is None
    assert bootstrap_mean(np.array([6.0, 1.0]), np.array([2.0, 1.0]), num_samples=0, seed=0) is None
