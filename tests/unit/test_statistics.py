"""Intervals against published values and against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest

from longext.evals.statistics import (
    bootstrap_mean,
    leaders,
    mean_interval,
    share_interval,
    stderr_interval,
    wilson_interval,
)


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


@pytest.mark.parametrize(
    ("value", "stderr", "count", "interval"),
    [
        (0.5, 0.1, 10, (0.5 - 0.1 * 1.959964, 0.5 + 0.1 * 1.959964)),
        (0.0, 0.0, 10, (0.0, 0.2775)),  # Wilson's
        (1.0, 0.0, 10, (0.7225, 1.0)),
        (1.0, 0.0, None, None),
        (0.4, 0.0, 10, None),
        (0.4, None, 10, None),
    ],
)
def test_a_standard_error_of_zero_is_no_certainty(value, stderr, count, interval):
    found = stderr_interval(value, stderr, count)
    assert found == (interval if interval is None else pytest.approx(interval, abs=1e-4))


def test_the_interval_of_a_mean_is_that_of_independent_estimates():
    rng = np.random.default_rng(0)
    rows = [rng.random(200), rng.random(50) ** 2, (rng.random(80) < 0.3).astype(float)]
    estimates = [(float(own.mean()), *share_interval(own)) for own in rows]
    low, high = mean_interval(estimates)
    mean = np.mean([own.mean() for own in rows])
    error = np.sqrt(sum(own.var() / len(own) for own in rows)) / 3
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    certain = [(1.0, *share_interval([1.0] * 10))] * 4
    assert mean_interval(certain) == pytest.approx((1 - (1 - 0.7225) / 2, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("estimates", "best", "tied"),
    [
        ([(0.9, (0.8, 0.95)), (0.5, (0.4, 0.6)), (0.7, (0.6, 0.79))], 0, set()),
        ([(0.9, (0.8, 0.95)), (0.5, (0.4, 0.6)), (0.85, (0.7, 0.9))], None, {0, 2}),
        ([(0.17, (0.03, 0.56)), (0.0, (0.0, 0.39))], None, set()),  # all share it
        ([(2.0, (1.5, 2.5)), (1.0, None)], None, set()),
        ([(2.0, None)], None, set()),
        ([], None, set()),
    ],
)
def test_the_lead_is_shared_unless_intervals_part(estimates, best, tied):
    assert leaders(estimates, lower_is_better=False) == (best, frozenset(tied))
    mirrored = [(-value, interval and (-interval[1], -interval[0])) for value, interval in estimates]
    assert leaders(mirrored, lower_is_better=True) == (best, frozenset(tied))


def test_numbers_that_are_no_samples_need_no_interval():
    alone, both = [(2.0, None), (1.0, None)], [(2.0, None), (2.0, None), (1.0, None)]
    assert leaders(alone, lower_is_better=False) == leaders(both, lower_is_better=False) == (None, frozenset())
    assert leaders(alone, lower_is_better=False, exact=True) == (0, frozenset())
    assert leaders(both, lower_is_better=False, exact=True) == (None, frozenset({0, 1}))
