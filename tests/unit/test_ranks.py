"""Likelihood: places by hand, chance, and a prompt read once as if it were read with every candidate."""

from __future__ import annotations

import pytest
import torch

from longext.errors import LongextError
from longext.evals.ranks import Choices, Rank, _ranked, choices_of, ranked_tables
from longext.evals.suites.needle import Needle
from longext.models.continuations import Continuations


def test_places_by_hand():
    assert _ranked([1.0], [2.0, 3.0, 0.5]) == (0, pytest.approx(2 / 3), 2, 4)
    assert _ranked([0.1, 5.0], [2.0, 3.0]) == (0.5, 0.5, 2, 3)
    assert _ranked([1.0], [1.0]) == (0.5, 0.5, 1.5, 2)


def test_tables_hold_chance_and_intervals():
    ranks = [Rank("a", 8, None, score, 0.5, 2, 4, 8) for score in (0, 1)]
    (cell,) = ranked_tables(ranks, ())["ranked"]
    assert (cell["score"], cell["chance"], cell["num_candidates"]) == (0.5, 0.25, 4)
    assert cell["low"] < 0.5 < cell["high"]
    assert set(ranked_tables(ranks, ("by_task", "by_length"))) == {"ranked", "ranked_by_task", "ranked_by_length"}


def test_a_prompt_read_once_gives_what_whole_texts_give(books):
    prompt, others = (
        books.encode("The keeper of the light"),
        [books.encode(t) for t in (" was old", " rope", " a b c d")],
    )
    reader = Continuations(books)
    found = reader.nll(prompt, others)
    assert reader.reads_once
    whole = [books.score(torch.tensor([[*prompt, *ids]]), len(prompt)).nll.sum().item() for ids in others]
    assert found == pytest.approx(whole, abs=1e-3)
    reader.reads_once = False
    assert reader.nll(prompt, others) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_likelihood_that_is_no_number_ranks_nothing(books, value):
    prompt, reader = books.encode("The keeper of the light"), Continuations(books)
    others = [books.encode(t, add_bos=False) for t in (" was old", " rope")]
    reader.decide(prompt, others)
    broken = next(token for token in range(100, 200) if token not in (*prompt, *others[0], *others[1]))
    with torch.no_grad():
        books.model.get_input_embeddings().weight[broken] = value
    with pytest.raises(LongextError, match="for a continuation of 2 tokens are not finite numbers"):
        reader.nll([*prompt, broken, *prompt], others)


def test_white_space_goes_with_the_candidate(books):
    choices = choices_of(
        lambda text: books.encode(text, add_bos=False),
        lambda opening: books.encode(f"Who?{opening}"),
        " it is: ",
        ["A"],
        ["B"],
    )
    assert books.decode(choices.input_ids).endswith("it is:")
    assert [books.decode(ids) for ids in (*choices.right, *choices.wrong)] == [" A", " B"]
    assert isinstance(choices, Choices)


def test_needles_are_ranked_among_values_of_their_kind(books):
    task = Needle(model="m", tasks=("multikey",), lengths=(512,), num_trials=2, answers="likelihood")
    for question in task.questions(books, None):
        wrong = [books.decode(ids).strip() for ids in question.choices.wrong]
        assert len(set(wrong)) == 9
        text = books.decode(question.input_ids)
        assert sum(value in text for value in wrong) == 3
        assert question.prompt.answers[0] not in wrong
        assert question.choices.input_ids == question.input_ids
