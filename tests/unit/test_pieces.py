"""Training rows that never cross a document: which pieces there are, and what of them is scored."""

from __future__ import annotations

import pytest

from longext.data.cache import TokenizedText, build_token_cache
from longext.data.packing import DocumentRows
from longext.errors import DataError


def rows_of(tmp_path, texts, **sizes):
    cache = build_token_cache(texts, tmp_path / "cache")
    return DocumentRows(cache, seed=0, num_rows=8, **sizes)


def test_pieces_stay_inside_documents_and_short_ends_are_left_out(tmp_path):
    texts = [TokenizedText(id="a", input_ids=range(10, 35)), TokenizedText(id="b", input_ids=range(40, 45))]
    rows = rows_of(tmp_path, texts, length=10, minimum=5, skip=3)
    found = sorted((rows[i] for i in range(4)), key=lambda row: int(row["input_ids"][0]))
    assert [row["input_ids"].tolist()[: row["num_tokens"]] for row in found] == [
        list(range(10, 20)), list(range(20, 30)), list(range(30, 35)), list(range(40, 45)),
    ]  # fmt: skip
    assert found[2]["labels"].tolist() == [-100] * 3 + [33, 34] + [-100] * 5
    assert rows.num_available == 4


def test_pieces_without_an_answer_to_learn_are_left_out(tmp_path):
    """An answer that the skipped tokens hold teaches nothing: a step of such rows would have no gradient."""
    early = [True] * 3 + [False] * 7
    late = [False] * 8 + [True] * 2
    texts = [TokenizedText(id=n, input_ids=range(10), trained=t) for n, t in (("early", early), ("late", late))]
    rows = rows_of(tmp_path, texts, length=10, minimum=5, skip=4)
    assert rows.num_available == 1
    assert rows[0]["labels"].tolist() == [-100] * 8 + [8, 9]


def test_data_without_any_piece_is_refused(tmp_path):
    short = [TokenizedText(id="a", input_ids=range(4))]
    with pytest.raises(DataError, match="the longest has 4"):
        rows_of(tmp_path, short, length=10, minimum=5, skip=1)
    early = [TokenizedText(id="a", input_ids=range(10), trained=[True] * 4 + [False] * 6)]
    with pytest.raises(DataError, match="after its first 4"):
        rows_of(tmp_path / "other", early, length=10, minimum=5, skip=4)
