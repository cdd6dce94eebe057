"""Sequential tests: their errors over simulated runs and all orders, exact numbers, and questions in rounds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest

from longext.errors import ConfigError
from longext.evals.base import make_eval
from longext.evals.limits import PlaceLimit
from longext.evals.sequential.asking import Decisions, ask_questions
from longext.evals.sequential.means import LookTest, MeanTest, decide, planned_interval, stakes
from longext.evals.suites.effective import STEP, Effective, longest, most_lengths, search_lengths


def outcomes(values, limit, errors=(0.05, 0.05), grain=1.0):
    """Return the verdict of each run, and after how many values it came: values [runs, n], of all that are planned."""
    codes = decide(values, limit, values.shape[-1], *errors, grain)
    assert (codes[:, -1] >= 0).all()
    first = np.argmax(codes >= 0, -1)
    return np.take_along_axis(codes, first[:, None], -1)[:, 0] == 1, first + 1


def shuffled(values, runs, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.asarray(values, dtype=np.float64)) for _ in range(runs)])


@pytest.mark.parametrize("right", [60, 75, 78, 79, 80, 81, 82, 85, 95])
def test_verdicts_are_wrong_in_at_most_five_percent_of_runs_at_and_around_the_limit(right):
    """500 runs of 100 planned prompts: the verdict is whether at least 80 of all 100 are right."""
    verdicts, numbers = outcomes(shuffled(np.arange(100) < right, 500, right), 0.8)
    assert np.mean(verdicts != (right >= 80)) <= 0.05
    if abs(right - 80) >= 15:  # far from the limit few prompts say it
        assert np.mean(numbers) < 50


def test_far_from_the_limit_a_handful_of_prompts_decides():
    verdicts, numbers = outcomes(np.stack([np.zeros(200), np.ones(200)]), 0.8)
    assert verdicts.tolist() == [False, True]
    assert numbers[0] == 3
    assert numbers[1] <= 25


@pytest.mark.parametrize("mean", [0.72, 0.79, 0.8, 0.81, 0.88])
def test_shares_have_the_same_guarantee(mean):
    values = np.random.default_rng(3).beta(4, 1, 120)
    values = np.round(np.clip(values * mean / values.mean(), 0, 1) * 4) / 4  # quarters, as of four needles
    for grain in (0.0, 0.25):
        verdicts, _ = outcomes(shuffled(values, 400, 7), 0.8, grain=grain)
        assert np.mean(verdicts != (values.mean() >= 0.8 - 1e-9)) <= 0.05


@pytest.mark.parametrize(("total", "right", "limit"), [(6, 3, 0.5), (6, 2, 0.5), (7, 6, 0.9), (7, 7, 0.9), (8, 4, 0.6)])
def test_over_all_orders_of_a_small_plan(total, right, limit):
    """Every order counts once, so the share of wrong verdicts is exact."""
    orders = list(itertools.combinations(range(total), right))
    values = np.array([[float(i in places) for i in range(total)] for places in orders])
    verdicts, _ = outcomes(values, limit, errors=(0.2, 0.1))
    assert np.mean(verdicts != (right / total >= limit)) <= (0.1 if right / total >= limit else 0.2)


def test_an_error_of_zero_stops_where_no_value_left_can_change_the_verdict():
    values = shuffled(np.arange(50) < 42, 50)
    verdicts, numbers = outcomes(values, 0.8, errors=(0, 0))
    right = np.cumsum(values, -1)
    is_certain = (right >= 40) | (right + 49 - np.arange(50) < 40)
    assert verdicts.all()
    assert (numbers == np.argmax(is_certain, -1) + 1).all()


def test_the_stake_is_fair_and_is_the_likelihood_ratio_of_drawing_without_replacement():
    def drawn(right, values, total):  # probability of this order if so many are right
        rest, found = total - len(values), sum(values)
        return math.comb(rest, right - found) / math.comb(total, right) if 0 <= right - found <= rest else 0.0

    # 48 planned and 24 right by the claim: the 24 bets are on 25, 26, ... 48 right
    values = (1, 1, 0, 1, 1, 0, 1)
    ratios = [drawn(right, values, 48) / drawn(24, values, 48) for right in range(25, 49)]
    assert stakes(values, 48, 0.5)[-1] == pytest.approx(np.mean(ratios))
    # over all orders of the claim itself the mean stake is 1, whenever one looks
    orders = [[float(i in places) for i in range(8)] for places in itertools.combinations(range(8), 4)]
    assert stakes(orders, 8, 0.5).mean(0) == pytest.approx(np.ones(8))


def test_values_in_parts_have_the_verdict_of_all_at_once():
    (values,) = shuffled(np.arange(100) < 70, 1)
    whole, parts = MeanTest(0.8, 100, 0.05, 0.05, 1), MeanTest(0.8, 100, 0.05, 0.05, 1)
    whole.add(values.tolist())
    for start in range(0, 100, 7):
        parts.add(values[start : start + 7].tolist())
    assert (parts.verdict, parts.values) == (whole.verdict, whole.values)
    assert whole.verdict is False
    assert whole.mean == pytest.approx(np.mean(values[: len(whole.values)]))


def test_a_verdict_is_the_side_of_the_limit_on_which_the_mean_is():
    for right in (70, 79, 80, 81, 90):
        for values in shuffled(np.arange(100) < right, 40, right):
            test = MeanTest(0.8, 100, 0.05, 0.05, 1)
            assert test.add(values.tolist()) == (test.mean >= 0.8)


def test_intervals_hold_the_mean_of_the_plan_wherever_one_stops():
    missed = 0
    for values in shuffled(np.arange(60) < 45, 200):
        bounds = [planned_interval(values[:number], 60) for number in (5, 30)]
        missed += any(not low <= 0.75 <= high for low, high in bounds)
    assert missed <= 10
    assert planned_interval(values, 60) == pytest.approx((0.75, 0.75), abs=2e-4)
    assert planned_interval([1.0, 1.0, 0.0], 10, 0) == pytest.approx((0.2, 0.9), abs=2e-4)


@pytest.mark.parametrize("mean", [-0.3, -0.05, 0.0, 0.05, 0.3])
def test_means_without_bounds(mean):
    values = np.random.default_rng(5).normal(0, 0.3, 60)
    values += mean - values.mean() - 1e-12  # a mean of 0 is one that is at most 0
    wrong, numbers = 0, []
    for order in shuffled(values, 300, 9):
        test = LookTest(60, 0.05, 0.05)
        numbers.append(next(number for number, value in enumerate(order, 1) if test.add(value) is not None))
        wrong += test.verdict != (mean <= 0)
    assert wrong <= 15
    if abs(mean) == 0.3:
        assert np.mean(numbers) < 30


# --- questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A question of a simulated run."""

    task: str
    length: int
    is_right: bool


def simulated(limits, right, error=0.05, seed=0, planned=60):
    """Decide limits on prompts at lengths; `right` is length -> how many of the planned ones are right."""
    questions = [Asked("", length, number < count) for length, count in right.items() for number in range(planned)]
    decisions = Decisions(limits, questions, error=error, seed=seed, grain=1)
    decisions.ask(4, lambda batch: [float(each.is_right) for each in batch])
    return decisions


def test_a_run_of_several_limits_is_wrong_in_at_most_five_percent_of_runs():
    limits = [PlaceLimit(str(length), None, str(length), 0.8) for length in (512, 1024, 2048)]
    good = [simulated(limits, {512: 60, 1024: 50, 2048: 48}, seed=seed).passed for seed in range(200)]
    assert sum(not all(each) for each in good) <= 10
    bad = [simulated(limits, {512: 60, 1024: 60, 2048: 47}, seed=seed).passed for seed in range(200)]
    assert sum(all(each) for each in bad) <= 10


def test_what_is_decided_is_not_asked_again_and_orders_are_seeded():
    limits = [PlaceLimit("512", None, "512", 0.5), PlaceLimit("1024", None, "1024", 0.8)]
    decisions = simulated(limits, {512: 60, 1024: 48, 2048: 60})
    easy, hard = decisions.rows()
    assert (easy["num_planned"], hard["num_planned"]) == (60, 60)
    assert easy["num_asked"] < 15 < hard["num_asked"]
    assert easy["low"] > 0.4
    assert decisions.num_asked <= easy["num_asked"] + hard["num_asked"] + 60 // 8 + 4
    assert decisions.rows() == simulated(limits, {512: 60, 1024: 48, 2048: 60}).rows()
    assert "Asked" in decisions.note("prompts")


def test_the_effective_length_is_that_of_all_prompts_in_at_least_ninety_five_percent_of_runs():
    """Accuracy falls slowly through the bar, so that lengths near it are hard to tell."""
    rng = np.random.default_rng(1)
    lengths = range(STEP, 2049, STEP)
    answers = {n: rng.random(40) < 1 / (1 + (n / 1500) ** 3) for n in lengths}
    wanted = search_lengths(lambda n: list(answers[n]), minimum=128, maximum=2048, limit=0.8)
    wrong, asked = 0, 0
    for seed in range(200):
        task = make_eval("effective", "books-5m", max_length=2048, error_rate=0.05, seed=seed)
        assert isinstance(task, Effective)

        def measure(length, task=task):
            found = []

            def answer(questions):
                found.extend(each.is_right for each in questions)
                return [float(each.is_right) for each in questions]

            task.decide([Asked("", length, bool(right)) for right in answers[length]]).ask(4, answer)
            return found

        tried = search_lengths(measure, minimum=128, maximum=2048, limit=0.8)
        wrong += longest(tried) != longest(wanted)
        asked += sum(row.num_trials for row in tried) / sum(row.num_trials for row in wanted)
    assert wrong <= 10
    assert asked / 200 < 0.9


def test_what_a_round_asked_after_the_verdict_does_not_turn_it():
    turned = 0
    for seed in range(40):
        questions, asked = [Asked("", 64, number < 39) for number in range(50)], []
        decisions = Decisions([PlaceLimit("all", None, None, 0.8)], questions, error=0.4, seed=seed, grain=1)

        def answer(batch, asked=asked):
            asked += [float(each.is_right) for each in batch]
            return asked[-len(batch) :]

        number = ask_questions(decisions, questions, 16, answer)
        assert [sum(asked[:number]) >= 0.8 * number] == decisions.passed
        turned += [sum(asked) >= 0.8 * len(asked)] != decisions.passed
    assert turned


@pytest.mark.parametrize(("minimum", "maximum"), [(64, 64), (128, 2048), (128, 4096), (192, 8192), (64, 4032)])
def test_the_error_is_shared_by_as_many_lengths_as_a_search_can_try(minimum, maximum):
    most = 0
    for threshold in range(0, maximum + 1, STEP):
        tried = search_lengths(lambda n, t=threshold: [n <= t], minimum=minimum, maximum=maximum, limit=0.8)
        most = max(most, len(tried))
    assert most <= most_lengths(minimum, maximum) <= most + 3


def test_an_error_rate_needs_a_limit_and_a_model():
    with pytest.raises(ConfigError, match="--fail-under is decided"):
        make_eval("passkey", "books-5m", error_rate=0.05).check()
    with pytest.raises(ConfigError, match="--predictions has the answers"):
        make_eval("needle", "", predictions="a.jsonl", fail_under=("0.5",), error_rate=0.05).check()


def test_suites_stop_early_with_the_verdict_of_all_prompts(books):
    """books-5m finds passkeys inside its window and none far beyond it."""
    from longext.evals.runner import run_eval

    given = {"lengths": (192, 768), "num_trials": 3, "fail_under": ("192=0.7", "768=0.7")}
    full = run_eval(make_eval("passkey", "books-5m", **given), books).record
    early = run_eval(make_eval("passkey", "books-5m", **given, error_rate=0.05), books).record
    assert [row["passed"] for row in early["bars"]] == [row["passed"] for row in full["bars"]] == [True, False]
    assert sum(row["num_trials"] for row in early["results"]) < 24
    assert all(row["low"] <= row["value"] <= row["high"] for row in early["bars"])


@pytest.mark.parametrize("answers", ["generate", "likelihood"])
def test_questions_in_rounds_go_on_from_their_answers(books, tmp_path, answers):
    from longext.evals.base import Work
    from longext.evals.runner import run_eval

    task = make_eval(
        "longeval", "books-5m", sizes=(4,), num_cases=16, answers=answers, fail_under=("0.5",), error_rate=0.05
    )
    first = run_eval(task, books, answers=tmp_path / "rounds")
    (bar,) = first.record["bars"]
    assert bar["num_asked"] < bar["num_planned"] == 16
    if answers == "generate":
        assert sorted(file.name for file in (tmp_path / "rounds").iterdir())[0] == "00000.jsonl"
        assert len(first.files["answers.jsonl"].splitlines()) >= bar["num_asked"]
    again = run_eval(task, books, answers=tmp_path / "rounds")
    assert again.record["bars"] == first.record["bars"]
    assert Work().answers is None
