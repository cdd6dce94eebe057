"""`longext advise`: who is told apart, what is chosen, and what is said of it."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from longext.errors import ConfigError
from longext.evals.sequential.elimination import FEWEST, Candidate, best_of, drop_beaten, eliminate, groups, summary
from longext.evals.statistics import paired_interval, sign_test, student_quantile
from longext.report.commands.advise import Advice, advice_figures, advice_tables

N, L = 4096, 512
NOISE = np.random.default_rng(0).normal(0, 0.3, 48)  # of places, the same for all methods


def made(name, nll=3.5, recall=0.9, rank=0, is_checkpoint=True, places=24, is_control=False):
    """A candidate with a mean NLL and a share of passkeys, paired with all others."""
    jitter = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.02, 48)
    own = Candidate(name, rank, is_checkpoint, is_control)
    values = list(nll + NOISE[:places] + jitter[:places])
    own.nll = {length: values for length in (L, N // 2, N)}
    own.found = [int(i < recall * 2 * places) for i in range(2 * places)]
    return own


@pytest.mark.parametrize(
    ("freedom", "exact"), [(2, 4.302653), (4, 2.776445), (5, 2.570582), (11, 2.200985), (23, 2.068658), (100, 1.983972)]
)
def test_quantiles_of_student_s_t(freedom, exact):
    assert student_quantile(0.975, freedom) == pytest.approx(exact, rel=1e-3)


def test_a_paired_interval_covers_as_it_says():
    rng = np.random.default_rng(1)
    hits = [low < 0 < high for low, high in (paired_interval(rng.normal(0, 1, 6)) for _ in range(2000))]
    assert 0.93 < np.mean(hits) < 0.97
    narrow, wide = paired_interval(NOISE), paired_interval(NOISE, 8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_sign_test_is_the_exact_binomial_one():
    assert sign_test(0, 9) == pytest.approx(2 / 2**9)
    assert sign_test(3, 7) == pytest.approx(2 * (1 + 10 + 45 + 120) / 2**10)
    assert sign_test(0, 0) == 1 == sign_test(2, 2)


def test_what_is_told_apart_is_dropped_but_not_for_what_no_engine_reads():
    remapped, worse = made("remapped", 3.3, 1.0, 1, is_checkpoint=False), made("worse", 3.9)
    yarn, control = made("yarn", 3.5), made("control", 3.0, 0.0, is_checkpoint=False, is_control=True)
    alive = drop_beaten([remapped, worse, yarn, control], N)
    assert alive == [remapped, yarn, control]
    assert worse.beaten_by in ("yarn", "remapped")
    assert {name: best_of(group, N)[0].name for name, group in groups(alive).items()} == {
        "engines": "yarn",
        "transformers": "remapped",
    }


def test_better_text_does_not_beat_more_passkeys():
    text, finder = made("text", 3.3, 0.3), made("finder", 3.6, 1.0)
    assert drop_beaten([text, finder], N) == [text, finder]
    assert best_of([text, finder], N) == (finder, [])


def test_of_those_that_are_not_told_apart_the_simplest_is_taken_and_the_others_are_named():
    simple, better = made("simple", 3.502, 0.9, 0), made("better", 3.5, 0.92, 1)
    assert best_of([better, simple], N) == (simple, [better])
    few = [made("simple", 4.5, 0.5, 0, places=2), made("better", 3.5, 1.0, 1, places=2)]
    assert best_of(few, N)[0].name == "better"  # too few to say anything: the best numbers


def test_it_stops_when_the_answer_is_clear_and_measures_what_is_beaten_no_further():
    full = {name: made(name, nll, 0.9) for name, nll in (("a", 3.0), ("b", 4.0), ("c", 4.5))}
    candidates = [Candidate(name, 0, True) for name in full]

    def measure(each, place):
        for length in (L, N):
            each.nll.setdefault(length, []).append(full[each.name].nll[length][place])
        each.found += [1, 0]

    assert eliminate(candidates, N, 48, measure, lambda: False) == FEWEST
    assert [each.beaten_by for each in candidates] == ["", "a", "a"]
    late = [Candidate(name, 0, True) for name in full]
    assert eliminate(late, N, 48, measure, lambda: True) == 1


def record(candidates, **more):
    base = made("none", 3.6)
    engines = ["vLLM 0.33.0", "llama.cpp 0.3.36"]
    rows = [summary(each, base, [L, N // 2, N], L) for each in candidates]
    for row in rows:
        row.update(engines=engines if row["is_checkpoint"] else [], kind="yarn")
    answers = {}
    for name, group in groups(candidates).items():
        chosen, tied = best_of(group, N)
        answers[name] = {"method": chosen.name, "not_told_apart": [each.name for each in tied]}
    known = {"target_length": N, "trained_length": L, "window_perplexity": base.perplexity(L), "num_places": 24}
    return {
        **known,
        "model": {"id": "org/model"},
        "data": {"source": "sample"},
        "is_enough": True,
        "answers": answers,
        "methods": rows,
        **more,
    }


def test_the_answer_is_two_sentences_and_the_command_that_follows():
    candidates = [made("yarn"), made("leaky-rerope:logn=true", 3.3, 1.0, 1, False), made("dynamic:alpha=8", 4.2, 0.2)]
    drop_beaten(candidates, N)
    advice = Advice(record(candidates))
    assert advice.answer[0].startswith("For serving engines take yarn: perplexity ")
    assert "vLLM, llama.cpp read it" in advice.answer[0]
    assert advice.answer[1].startswith("In transformers with longext take leaky-rerope:logn=true")
    assert "The far text helps" in advice.answer[2]
    assert "--data" in advice.answer[3]
    assert advice.commands == [
        "longext extend org/model --method yarn --target-length 4096 -o model-4096",
        "longext generate org/model --method leaky-rerope:logn=true --factor 8 --context FILE --prompt ...",
    ]
    of_a_tag = Advice(record([made("yarn:factor=4")], revision="v1")).commands
    assert of_a_tag == ["longext extend org/model --revision v1 --method yarn --factor 4 -o model-4096"]
    assert advice.method() == "leaky-rerope:logn=true" and advice.method("engines") == "yarn"
    row = summary(candidates[0], made("none", 3.6), [L, N], L)
    assert math.log1p(row["price"]["change"]) == pytest.approx(-0.1, abs=0.02)
    assert "leaky-rerope" in repr(advice) and len(advice_figures(advice.record)) == 1
    assert all(sum(table.widths) <= 100 for table in advice_tables(advice.record))


def test_what_is_not_told_apart_is_said():
    candidates = [made("yarn", 3.502, 0.9), made("lampe", 3.5, 0.92, 1, False)]
    said = Advice(record(candidates)).answer
    assert "nothing is told apart from yarn as better" in said[1] and "lampe has better numbers" in said[1]
    undecided = Advice(record(candidates, is_enough=False, num_places=2)).answer
    assert any(text.startswith("Undecided") for text in undecided)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_length": 512}, "above the trained length 512"),
        ({"target_length": 1024, "methods": ("window",)}, "besides the control"),
        ({"target_length": 1024, "methods": ("leaky-rerope:wide=2",)}, "takes no `wide`"),
        ({"target_length": 1024, "methods": ("none",)}, "always measured"),
        ({"target_length": 1_000_000, "methods": ("yarn",)}, "No document of sample has"),
    ],
)
def test_what_cannot_be_tried_is_one_line(settings, words):
    import longext

    with pytest.raises(Exception, match=words) as error:
        longext.advise("books-5m", device="cpu", **settings)
    assert isinstance(error.value, ConfigError) or "sample" in words


def test_a_trial_runs_on_the_bundled_model():
    """The price of what is exact inside, and the control that reads nothing far: known numbers of a real run."""
    import longext

    found = longext.advise(
        "books-5m", 1024, methods=("dynamic:alpha=2", "window", "yarn"), num_places=1, device="cpu"
    ).record
    rows = {row["name"]: row for row in found["methods"]}
    assert rows["dynamic:alpha=2"]["price"]["change"] == pytest.approx(0, abs=1e-6)
    assert rows["window"]["price"]["change"] == pytest.approx(0, abs=1e-4)
    assert rows["yarn"]["price"]["change"] > 0.005
    assert not found["is_enough"] and found["answers"]["engines"]["method"] == "yarn"
    assert rows["yarn"]["engines"] and not rows["dynamic:alpha=2"]["engines"]
