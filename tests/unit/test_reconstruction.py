"""Greedy decoding from memory against forward passes without a cache, and what is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressors import SEGMENT, VARIANTS, make_compressor, random_ids, tiny_llama

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.compressor.gradients import Sweep
from longext.compressor.reading.decoder import CachedDecoder, greedy
from longext.compressor.segments import REPEAT, Segment, reconstruction_segments
from longext.errors import DataError
from longext.evals.memory.reconstruction import (
    CONTENTS,
    _base_nll,
    _score,
    draw_segments,
    reconstruct,
    vocabulary_of,
)

LENGTH = SEGMENT


def tiny(variant="uio", **keys):
    """A random compressor of 16-token segments in float64 whose model is sure of itself."""
    return make_compressor(variant, tiny_llama(initializer_range=0.2), **keys)


def tokens(rows=3, seed=1):
    return random_ids(rows, 1, seed)


def memory_of(compressor, rows, ratio=4):
    document = Sweep(reconstruction_segments(rows, ratio, compressor.spec.sink), compressor)
    store = document.new_store()
    store.put(0, document.write(0, store))
    return document.segments[1], store.view(0, 1)


@torch.no_grad()
def slow_greedy(compressor, rows, ratio=4):
    """One row at a time, every token by a whole forward pass of `read`."""
    found = []
    for row in rows:
        asked, memory = memory_of(compressor, row[None], ratio)
        ids = [REPEAT, *asked.sink[0].tolist()]
        while len(ids) <= LENGTH:
            given = torch.tensor([ids])
            segment = Segment(given, torch.full_like(given, -100), asked.before, asked.sink, ratio)
            ids.append(int(compressor.backbone.logits(compressor.read(segment, memory)[0, -1]).argmax()))
        found.append(ids[1:])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_decoding_with_a_cache_equals_whole_passes_of_read(variant):
    compressor, rows = tiny(variant), tokens()
    found = reconstruct(compressor, rows, 4)
    assert found == slow_greedy(compressor, rows)
    assert len({tuple(row) for row in found}) == len(rows)  # rows differ, so they were not mixed up
    assert compressor.adapters._active == {}


def test_the_sink_is_given_and_not_scored():
    compressor, rows = tiny(sink=3), tokens()
    assert [row[:3] for row in reconstruct(compressor, rows, 4)] == rows[:, :3].tolist()
    scores = _score(compressor, rows, 4, [])
    asked, memory = memory_of(compressor, rows)
    assert asked.labels[0].tolist() == [-100] * 3 + rows[0, 3:].tolist()
    with torch.no_grad():
        total = compressor.loss(compressor.read(asked, memory), asked)
        alone = compressor.loss(compressor.read(asked, compressor.fixed(asked.sink)), asked)
    assert scores.nll_memory.sum() == pytest.approx(float(total), rel=1e-6)
    assert scores.nll_none.sum() == pytest.approx(float(alone), rel=1e-6)


def test_the_base_loss_is_that_of_the_model_itself():
    compressor, rows = tiny(sink=1), tokens()
    ids = torch.cat([torch.full((3, 1), 2), rows], 1)
    with torch.no_grad():
        logits = compressor.backbone.model(ids).logits.log_softmax(-1)[:, 1:-1]
    expected = -logits.gather(-1, rows[:, 1:, None]).sum((1, 2))
    assert _base_nll(compressor, rows, 2) == pytest.approx(expected.numpy(), rel=1e-5)


def test_decoding_stops_a_row_and_leaves_the_others_alone():
    compressor, rows = tiny(), tokens()
    whole = reconstruct(compressor, rows, 4)
    stop = whole[0][5]
    found = reconstruct(compressor, rows, 4, [stop])
    for row, full in zip(found, whole, strict=True):
        end = full.index(stop, 1) if stop in full[1:] else len(full)
        assert row == full[:end]
    assert len(found[0]) <= 5


def test_a_decoder_fed_in_pieces_equals_one_pass():
    backbone, rows = tiny().backbone, tokens()
    decoder = CachedDecoder(backbone, room=3)
    pieces = torch.cat([decoder.feed(part) for part in rows.split([7, 1, 6, 2], 1)], 1)
    with torch.no_grad():
        assert torch.allclose(pieces, backbone.run(backbone.embed(rows)), atol=1e-12)
    assert decoder.length == LENGTH
    assert decoder.num_bytes == 2 * 3 * (2 * 8) * 8 * LENGTH * len(rows)  # k and v, layers, heads x size, bytes
    assert greedy(decoder, rows[:, :1], 0) == [[], [], []]


def test_segments_are_disjoint_seeded_and_from_the_documents():
    documents = [list(range(50)), list(range(100, 110)), list(range(200, 248))]
    rows, available = draw_segments(documents, 16, 4, seed=0)
    assert (rows.shape, available) == ((4, 16), 6)
    assert {int(row[0]) for row in rows} <= {0, 16, 32, 200, 216, 232}
    assert len(np.unique(rows)) == rows.size
    assert (rows == draw_segments(documents, 16, 4, seed=0)[0]).all()
    assert len(draw_segments(documents, 16, 99, seed=1)[0]) == 6
    with pytest.raises(DataError, match=r"segment of 64 tokens: the longest has 50"):
        draw_segments(documents, 64, 4, seed=0)


def test_shuffling_keeps_the_words_and_moves_them(books):
    vocabulary = vocabulary_of(books.tokenizer, 8192)
    ids = np.array(books.encode(SAMPLE_DOCUMENT.read_text()[:2000], add_bos=False)[:128])
    rng = np.random.default_rng(0)
    shuffled = CONTENTS["shuffled"].make(ids, vocabulary, rng)
    assert sorted(shuffled) == sorted(ids)
    assert (shuffled != ids).mean() > 0.8
    ours, theirs = (sorted(books.decode([*row]).split()) for row in (shuffled[1:], ids[1:]))
    assert len(set(ours) & set(theirs)) > 0.9 * len(set(theirs))
    drawn = CONTENTS["random"].make(ids, vocabulary, rng)
    assert len(drawn) == 128
    assert not set(drawn.tolist()) & set(books.tokenizer.all_special_ids)


def test_a_compressor_trained_to_copy_gives_the_text_back():
    compressor = tiny("icae-kv", ratios=(1,)).float()
    compressor.backbone.model.float()
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(compressor.parameters(), lr=1e-2)
    rows = tokens(2)
    before = _score(compressor, rows, 1, []).correct.mean()
    for _ in range(150):
        asked, memory = memory_of(compressor, rows, 1)
        optimiser.zero_grad()
        (compressor.loss(compressor.read(asked, memory), asked) / rows.numel()).backward()
        optimiser.step()
    scores = _score(compressor, rows, 1, [])
    assert scores.correct.mean() == LENGTH - 1 > before
    assert scores.hypotheses == rows.tolist()
    assert (scores.nll_memory < 0.2 * scores.nll_none).all()
