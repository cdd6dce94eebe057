"""The search for the effective length, on accuracies that are known."""

from __future__ import annotations

import pytest

from longext.errors import ConfigError
from longext.evals.base import make_eval
from longext.evals.suites.effective import STEP, Effective, effective_notes, longest, longest_unbroken, search_lengths


def search(right, minimum=128, maximum=8192, limit=0.8, trials=20):
    """Search with `right(length)` correct answers of `trials`."""
    return search_lengths(
        lambda n: [i < right(n) for i in range(trials)], minimum=minimum, maximum=maximum, limit=limit
    )


def in_order(tried):
    return [row.length for row in sorted(tried, key=lambda row: row.order)]


@pytest.mark.parametrize("threshold", [128, 129, 191, 192, 700, 1024, 1087, 1088, 4095, 8191])
def test_a_threshold_is_found_to_the_step(threshold):
    tried = search(lambda n: 20 if n <= threshold else 0)
    assert longest(tried) == longest_unbroken(tried) == threshold // STEP * STEP
    assert len(tried) <= 8 + 6
    assert not any("monotone" in note for note in effective_notes(tried, config()))


@pytest.mark.parametrize(("minimum", "maximum"), [(64, 64), (192, 8192), (128, 1000 // STEP * STEP), (64, 4032)])
def test_lengths_are_multiples_of_the_step_within_the_limits_and_tried_once(minimum, maximum):
    calls = []

    def measure(length):
        calls.append(length)
        return [length <= 600] * 20

    tried = search_lengths(measure, minimum=minimum, maximum=maximum, limit=0.8)
    assert len(set(calls)) == len(calls)
    assert in_order(tried) == calls
    assert all(length % STEP == 0 and minimum <= length <= maximum for length in calls)
    assert longest(tried) == min(576, maximum)


def test_a_pass_everywhere_ends_at_the_maximum_and_says_so():
    tried = search(lambda n: 20, maximum=1088)
    assert in_order(tried) == [128, 256, 512, 1024, 1088]
    assert "may reach further" in " ".join(effective_notes(tried, config(max_length=1088)))


def test_two_failures_in_a_row_end_the_doubling():
    tried = search(lambda n: 0)
    assert in_order(tried) == [128, 256]
    assert (longest(tried), longest_unbroken(tried)) == (None, None)
    notes = " ".join(effective_notes(tried, config()))
    assert "not even 128" in notes
    assert "above 256 were not tried" in notes


def test_a_pass_above_a_failure_is_used_and_reported():
    tried = search(lambda n: 20 if n in (128, 512, 576) else 0)
    assert in_order(tried) == [128, 256, 512, 1024, 2048, 768, 640, 576]
    assert (longest(tried), longest_unbroken(tried)) == (576, 128)
    assert (
        "not monotone: 256 failed below it. Without a failure it passes up to 128"
        in effective_notes(tried, config())[1]
    )


def test_a_failure_at_the_first_length_alone():
    tried = search(lambda n: 20 if n in (256, 320) else 0)
    assert (longest(tried), longest_unbroken(tried)) == (320, None)
    assert "at no length" in " ".join(effective_notes(tried, config()))


def test_the_limit_itself_passes_and_the_interval_is_judged_apart():
    (row,) = search(lambda n: 16, minimum=64, maximum=64)
    assert row.accuracy == 0.8
    assert (row.passed, row.clearly) == (True, False)
    assert row.low == pytest.approx(0.584, abs=1e-3)
    assert "interval reaches below" in " ".join(effective_notes([row], config(min_length=64, max_length=64)))
    (row,) = search(lambda n: 20, minimum=64, maximum=64)
    assert row.clearly


def config(**changes):
    return Effective(**{"model": "m", "max_length": 8192, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bar": 0.0}, "--bar"),
        ({"bar": 1.01}, "--bar"),
        ({"bar": float("nan")}, "`bar` must be a finite number"),
        ({"max_length": 1000}, "--max-length must be a multiple of 64, got 1000: try 1024"),
        ({"min_length": 0}, "--min-length must be a multiple of 64, got 0: try 64"),
        ({"min_length": 256, "max_length": 128}, "above --max-length"),
        ({"depths": ()}, "--depths"),
        ({"test": "pasky"}, "Unknown test 'pasky'"),
        ({"num_trials": 0}, "`num_trials` must be >= 1"),
        ({"num_trials": 0, "test": "needle"}, "`num_trials` must be >= 1"),
    ],
)
def test_values_out_of_range(changes, text):
    with pytest.raises(ConfigError, match=text):
        make_eval("effective", **{"model": "m", "max_length": 8192, **changes}).check()
