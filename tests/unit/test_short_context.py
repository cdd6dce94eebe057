"""The short-context guard on models whose loss is known."""

from __future__ import annotations

import math

import pytest
import torch

from longext.data.documents import Document
from longext.errors import ConfigError, DataError
from longext.evals.suites.short import ShortTexts, compare_short, cut_windows, score_short, undecided, verdict_text
from longext.models.protocol import TokenScores


class Known:
    """Scores every token with a given NLL per token id; one token a character."""

    name = "known"
    device = torch.device("cpu")

    def __init__(self, extra=0.0, noise=0.0, bos=(1,)):
        self.extra, self.noise, self.prefix = extra, noise, bos

    def encode(self, text, *, add_bos=True):
        return [*(self.prefix if add_bos else ()), *map(ord, text)]

    def score(self, input_ids, first):
        tokens = input_ids[:, first:].float()
        wobble = torch.sin(tokens.sum(1, keepdim=True)) * self.noise  # one draw a window
        return TokenScores(tokens / 100 + self.extra + wobble, tokens > 0)


def texts(count, length=70):
    return [Document(f"d{i}", "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(length))) for i in range(count)]


def compared(model, documents, **changes):
    config = ShortTexts(model="", num_bootstrap=500, **changes)
    base = Known()
    cuts = cut_windows(base, documents, (8, 16), config)
    return compare_short(score_short(model, cuts, config), score_short(base, cuts, config), cuts, config)


@pytest.mark.parametrize("bos", [(1,), ()])
def test_every_length_covers_the_same_text_and_starts_with_bos(bos):
    documents = [*texts(2), Document("short", "abc")]
    config = ShortTexts(model="", num_windows=3)
    half, whole = cut_windows(Known(bos=bos), documents, (9, 17), config)
    assert {len(w.input_ids) for w in half.windows} == {9}
    assert {len(w.input_ids) for w in whole.windows} == {17}
    assert all(w.input_ids[: len(bos)] == bos for w in (*half.windows, *whole.windows))
    assert len(whole.windows) == 2 * 3
    for number in (0, 1):
        tokens, all_tokens = (
            [
                token
                for w, o in zip(cut.windows, cut.owners, strict=True)
                if o == number
                for token in w.input_ids[len(bos) :]
            ]
            for cut in (half, whole)
        )
        assert tokens == all_tokens[: len(tokens)]
        assert len(all_tokens) - len(tokens) < 9
    assert len(cut_windows(Known(bos=bos), documents, (16,), ShortTexts(model="", max_tokens=32))[0].windows) == 4


def test_a_constant_loss_is_found_exactly_with_an_interval_of_no_width():
    for row in compared(Known(extra=math.log(1.05)), texts(9)):
        assert row["change"] == pytest.approx(0.05, abs=1e-5)
        assert row["change_low"] == pytest.approx(0.05, abs=1e-5)
        assert row["change_high"] == pytest.approx(0.05, abs=1e-5)
        assert row["ppl"] == pytest.approx(1.05 * row["base_ppl"], rel=1e-5)
        assert (row["passed"], row["resampled"]) == (False, "documents")


def test_the_same_model_changes_nothing_and_passes_at_no_tolerance():
    rows = compared(Known(), texts(2), tolerance=0.0)
    assert all(row["change"] == 0 and row["passed"] and row["resampled"] == "windows" for row in rows)
    assert verdict_text(rows, 0.0).startswith("Passed")


def test_the_point_estimate_decides_and_the_interval_says_how_surely():
    rows = compared(Known(extra=math.log(1.019), noise=0.05), texts(12))
    assert all(row["change_low"] < row["change"] < row["change_high"] for row in rows)
    assert [row["passed"] for row in rows] == [row["change"] <= 0.02 for row in rows]
    assert (
        undecided(rows, 0.02) == [row["length"] for row in rows if row["change_low"] <= 0.02 < row["change_high"]] != []
    )


def test_a_single_window_has_no_interval():
    config = ShortTexts(model="", num_windows=1)
    cuts = cut_windows(Known(), texts(1), (16,), config)
    rows = score_short(Known(), cuts, config)
    (row,) = compare_short(rows, rows, cuts, config)
    assert (row["change_low"], row["change_high"], row["resampled"]) == (None, None, None)


def test_lengths_stay_within_the_trained_length():
    assert ShortTexts(model="").lengths_within(512) == (256, 512)
    assert ShortTexts(model="", lengths=(64, 32)).lengths_within(512) == (32, 64)
    with pytest.raises(ConfigError, match="trained length 512"):
        ShortTexts(model="", lengths=(513,)).lengths_within(512)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DataError, match="has 99 tokens: the longest has 70"):
        cut_windows(Known(), texts(2), (100,), ShortTexts(model=""))
    with pytest.raises(ConfigError, match="--against"):
        ShortTexts(model="m").check()
    ShortTexts(model="m", memory="window").check()
    ShortTexts(model="m", method="yarn", factor=8).check()
