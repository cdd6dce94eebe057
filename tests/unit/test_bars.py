"""Bars by hand: what is read, what is refused, what misses."""

from __future__ import annotations

import math

import pytest

from longext.errors import ConfigError, LongextError
from longext.evals.limits import (
    PERPLEXITY,
    POINTS,
    SHARE,
    check_names,
    place_limits,
    place_verdicts,
    read_limits,
    require_limits,
    verdict,
)
from longext.evals.retrieval import QuestionScore, mean_at

PLACES = [("single", "512"), ("single", "1024"), ("lines", "20")]


def test_bars_are_read_by_name():
    assert read_limits(["a=0.5", " b:c = 1"], form="X", scale=SHARE) == {"a": 0.5, "b:c": 1.0}
    assert read_limits(["0.25"], form="X", scale=SHARE, has_whole=True) == {"": 0.25}
    assert read_limits([], form="X", scale=SHARE) == {}


@pytest.mark.parametrize("bar", ["", "a", "a=", "a=x", "=0.5", "a=nan", "a=inf", "a=1.01", "a=-0.1", "a=90", "0.5"])
def test_bars_of_another_form_or_range_are_refused(bar):
    with pytest.raises(ConfigError, match=r"--fail-under takes FORM with a share of 0 to 1 \(0.9 for 90%\), got"):
        read_limits([bar], form="FORM", scale=SHARE)


def test_scales_have_their_own_ends():
    assert read_limits(["a=100"], form="X", scale=POINTS) == {"a": 100}
    with pytest.raises(ConfigError, match="--fail-over takes X with a perplexity of 1 or more, got 'a=0.5'"):
        read_limits(["a=0.5"], form="X", scale=PERPLEXITY, option="--fail-over")
    with pytest.raises(ConfigError, match="names a twice"):
        read_limits(["a=0.5", "a=0.6"], form="X", scale=SHARE)


def test_names_that_are_not_known():
    check_names({"lcc": 1.0}, ["lcc"])
    with pytest.raises(ConfigError, match="unknown task 'lc'. Did you mean 'lcc'"):
        check_names({"lc": 1.0}, ["lcc", "trec"])


def test_places_are_tasks_lengths_both_or_all():
    names = ["0.1", "single=0.2", "512=0.3", "lines@20=0.4", "all@1024=0.5"]
    found = [(bar.name, bar.task, bar.length, bar.limit) for bar in place_limits(names, PLACES)]
    assert found == [
        ("all", None, None, 0.1),
        ("single", "single", None, 0.2),
        ("512", None, "512", 0.3),
        ("lines@20", "lines", "20", 0.4),
        ("all@1024", None, "1024", 0.5),
    ]
    (bar,) = place_limits(["all=1"], [("", "64")])
    assert (bar.task, bar.length) == (None, None)


@pytest.mark.parametrize(
    ("bar", "message"),
    [
        ("singel=0.5", "unknown task 'singel'. Did you mean 'single'"),
        ("singel@512=0.5", "unknown task 'singel'"),
        ("single@20=0.5", "20 is not measured. Measured: 512, 1024."),
        ("8192=0.5", "8192 is not measured. Measured: 512, 1024, 20."),
        ("lines@512=0.5", "512 is not measured. Measured: 20."),
    ],
)
def test_places_that_are_not_measured(bar, message):
    with pytest.raises(ConfigError, match=message):
        place_limits([bar], PLACES)


def test_a_suite_without_tasks_knows_lengths_alone():
    with pytest.raises(ConfigError, match="8192 is not measured. Measured: 64, 128."):
        place_limits(["8192=0.5"], [("", "64"), ("", "128")])
    with pytest.raises(ConfigError, match="0.5"):
        place_limits(["0.5"], [("", "64")], has_whole=False)


@pytest.mark.parametrize(
    ("limit", "value", "at_most", "passed"),
    [
        (0.5, 0.5, False, True),
        (0.5, 0.4999, False, False),
        (20.0, 20.0, True, True),
        (20.0, 20.1, True, False),
        (20.0, math.inf, True, False),
        (20.0, math.nan, True, False),
        (0.0, math.nan, False, False),
        (0.0, None, False, False),
        (20.0, None, True, False),
    ],
)
def test_what_is_no_number_misses_every_bar(limit, value, at_most, passed):
    assert verdict("x", limit, value, at_most=at_most)["passed"] is passed


def test_one_line_names_all_that_was_missed():
    rows = [
        verdict("a", 0.5, 0.25),
        verdict("b", 0.5, 0.75),
        verdict("c", 30, 31.5, at_most=True),
        verdict("d", 1, None),
    ]
    with pytest.raises(LongextError) as error:
        require_limits({"bars": rows})
    assert (
        str(error.value)
        == "Missed --fail-under: a is 0.25 (at least 0.5); c is 31.5 (at most 30); d was not scored (at least 1)."
    )
    assert error.value.exit_code == 1
    require_limits({"bars": rows[1:2]})


def test_scores_are_means_over_the_prompts_of_a_place():
    scores = {("single", 512): (1, 0), ("single", 1024): (1, 1, 0.5, 0.5), ("lines", 20): (0,)}
    answers = [QuestionScore(task, length, None, score, 9) for (task, length), own in scores.items() for score in own]
    bars = place_limits(["0.1", "single=0.1", "1024=0.1", "single@512=0.6"], PLACES)
    rows = place_verdicts(bars, mean_at(answers))
    assert [row["value"] for row in rows] == pytest.approx([4 / 7, 4 / 6, 3 / 4, 1 / 2])
    assert [row["passed"] for row in rows] == [True, True, True, False]
    assert place_verdicts(bars, lambda task, length: None)[0]["passed"] is False
