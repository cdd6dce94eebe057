"""Needle prompts: exact token counts, keys that never repeat, seeds, and RULER's string match by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from longext.errors import ConfigError
from longext.evals.retrieval import QuestionScore, cells_of
from longext.evals.ruler.haystacks import Names
from longext.evals.ruler.tasks import match_all
from longext.evals.ruler.words import ADJECTIVES, NOUNS, draw_different
from longext.evals.statistics import share_interval
from longext.evals.suites.needle import SCORINGS, Needle
from longext.models.protocol import TokenScores

NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.")


def questions(model, **settings):
    defaults = {"num_trials": 1, "num_needles": 3, "max_new_tokens": 32}
    return Needle(model="m", **{**defaults, **settings}).questions(model, None)


def text_of(model, question):
    return model.decode(question.prompt.input_ids)


@pytest.mark.parametrize("haystack", ["noise", "book", "needles"])
@pytest.mark.parametrize("scoring", ["match", "exact"])
def test_prompt_and_budget_have_exactly_the_length(books, haystack, scoring):
    asked = questions(books, haystack=haystack, scoring=scoring, lengths=(600, 601, 1024))
    for question in asked:
        prompt = question.prompt
        budget = 32 if scoring == "match" else len(prompt.answer_ids)
        assert len(prompt.input_ids) + budget == question.length
    assert len({question.id for question in asked}) == len(asked) == 12


@pytest.mark.parametrize("haystack", ["noise", "book", "needles"])
def test_keys_and_values_never_repeat_and_the_answers_stand_in_the_text(books, haystack):
    for question in questions(books, haystack=haystack, lengths=(800,), num_trials=2):
        hidden = NEEDLE.findall(text_of(books, question))
        values = [value for _, _, value in hidden]
        keys = {key for _, key, _ in hidden}
        assert len(set(values)) == len(values)
        assert len(keys) == (len(values) - 2 if question.task == "multivalue" else len(values))
        asked = text_of(books, question).rpartition("mentioned in the provided text? ")[2]
        expected = [value for _, key, value in hidden if key in asked]
        assert sorted(expected) == sorted(question.prompt.answers)


def test_multivalue_answers_come_in_the_order_of_the_text(books):
    (question,) = questions(books, tasks=("multivalue",), lengths=(700,), haystack="noise")
    assert [value for *_, value in NEEDLE.findall(text_of(books, question))] == list(question.prompt.answers)


def test_the_answer_tokens_spell_the_answers(books):
    (question,) = questions(books, tasks=("multiquery",), lengths=(700,))
    prompt = question.prompt
    assert books.decode(prompt.answer_ids) == " " + ", ".join(prompt.answers)
    starts = (0, *prompt.ends)
    pieces = [books.decode(prompt.answer_ids[a:b]) for a, b in zip(starts, prompt.ends, strict=False)]
    assert [piece.strip(" ,") for piece in pieces] == list(prompt.answers)


def test_the_wording_follows_the_number_of_answers(books):
    one, several = questions(books, tasks=("multikey", "multiquery"), lengths=(600,))
    assert text_of(books, one).startswith("A special magic number is hidden")
    assert re.search(r"What is the special magic number for \S+ mentioned .* provided text is$", text_of(books, one))
    assert text_of(books, several).startswith("Some special magic numbers are hidden")
    ends = r"What are all the special magic numbers for \S+, \S+, and \S+ mentioned .* provided text are$"
    assert re.search(ends, text_of(books, several))


def test_seeds_give_the_same_prompts_and_others_do_not(books):
    again = [[q.prompt for q in questions(books, lengths=(600,), seed=seed)] for seed in (3, 3, 4)]
    assert again[0] == again[1]
    assert all(a.answers != b.answers for a, b in zip(again[0], again[2], strict=True))


@pytest.mark.parametrize("haystack", ["noise", "book", "needles"])
def test_depth_is_kept_to_within_a_sentence(books, haystack):
    lengths, depths = (2000,), (0.0, 0.5, 1.0)
    for question in questions(books, tasks=("multikey",), haystack=haystack, lengths=lengths, depths=depths):
        assert question.depth == question.prompt.depth
        text = text_of(books, question)
        place = text.index(f"is: {question.prompt.answers[0]}") / text.rindex("\nWhat is")
        assert abs(place - question.depth) < 0.12


def test_needles_stand_on_their_own_line_between_sentences(books):
    for question in questions(books, haystack="book", lengths=(900,), num_trials=3):
        for match in re.finditer(r"(.)\nOne of the special", text_of(books, question)):
            assert match.group(1) in ".!?"


def test_a_length_too_short_says_what_is_needed(books):
    with pytest.raises(ConfigError, match=r"task multiquery needs at least \d+ tokens, got 128"):
        questions(books, tasks=("multiquery",), lengths=(128,))
    with pytest.raises(ConfigError, match="An answer of the task multivalue has"):
        questions(books, tasks=("multivalue",), lengths=(600,), max_new_tokens=5)


def test_words_are_different_and_run_out_with_a_message():
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)
    letters = iter("aabbc")
    taken: set[str] = set()
    assert [draw_different(lambda: next(letters), taken, 10) for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="use uuids"):
        draw_different(lambda: "d", {"a", "b", "c"}, 3)
    names = Names(np.random.default_rng(0), "words", "uuids")
    assert len({names.key() for _ in range(3000)}) == len({names.value() for _ in range(3000)}) == 3000


def test_match_is_rulers():
    assert match_all(["123", "456", "789"], "The numbers are 123 and 789.") == pytest.approx(2 / 3)
    assert match_all(["old-fox"], "  OLD-Fox\x00") == 1
    assert match_all(["123"], "12 3") == 0
    assert match_all(["1"], "") == 0


class _Right:
    """A model whose first choice is right but for the tokens at `wrong` of each answer."""

    def __init__(self, model, wrong):
        self.device, self.prefix, self.encode, self.decode = model.device, model.prefix, model.encode, model.decode
        self.wrong = wrong

    def score(self, ids, first):
        top = torch.ones(ids.shape[0], ids.shape[1] - first, dtype=torch.bool)
        top[:, self.wrong] = False
        return TokenScores(torch.zeros(top.shape), top)


def test_exact_scoring_counts_values_whose_every_token_is_first(books):
    task = Needle(model="m", tasks=("multiquery",), lengths=(700,), num_trials=2, num_needles=3, scoring="exact")
    asked = task.questions(books, None)
    second = asked[0].prompt.ends[0] + 2
    shares = []
    for wrong in ([], [second], [second, 0], slice(None)):
        scores, answers = task.ask(_Right(books, wrong), asked)
        assert not answers
        shares.append([each.score for each in scores])
    assert shares == [[1, 1], [pytest.approx(2 / 3)] * 2, [pytest.approx(1 / 3)] * 2, [0, 0]]
    assert set(SCORINGS) == {"match", "exact"}


def test_cells_pool_prompts_and_give_intervals():
    scores = [QuestionScore("a", 10, 0.5, score, 8) for score in (0, 1, 1, 1)]
    a, b = cells_of([*scores, QuestionScore("b", 10, 0.0, 0.5, 12)])
    assert [a[key] for key in ("task", "depth", "num_trials", "score", "part", "whole")] == ["a", 0.5, 4, *[0.75] * 3]
    assert [b[key] for key in ("score", "part", "whole")] == [0.5, 1, 0]
    (both,) = cells_of([*scores, QuestionScore("b", 10, 0.0, 0.5, 12)], by_task=False, by_depth=False)
    assert [both[key] for key in ("task", "num_trials", "score", "num_tokens")] == ["all", 5, 0.7, 8.8]
    assert a["low"] < 0.75 < a["high"]


def test_intervals_are_never_narrower_for_equal_shares():
    assert share_interval([1, 1, 1]) == pytest.approx((0.4385, 1), abs=1e-4)  # Wilson, 3 of 3
    low, high = share_interval([0.5, 0.5, 0.5])
    assert low < 0.3
    assert high > 0.7
    low, high = share_interval([0, 0.25, 1, 0.5, 0.75])
    assert 0.1 < low < 0.5 < high < 0.95
