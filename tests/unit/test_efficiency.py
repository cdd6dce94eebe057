"""What is timed ends where reading the document ends, and the bytes are those of the closed form."""

from __future__ import annotations

import pytest
import torch
from compressors import SEGMENT, VARIANTS, make_compressor, make_document, random_ids, tiny_llama

from longext.evals.memory.efficiency import bytes_per_position, encode, evaluate_efficiency, ways_of, window_notes
from longext.evals.suites.efficiency import Efficiency


def ways_by_name(compressor, ratios=(4,), window=24):
    return {(way.name, way.ratio): way for way in ways_of(compressor.backbone, compressor, ratios, window)}


@pytest.mark.parametrize("length", [17, 32, 40, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compressor_ends_where_reading_the_document_ends(variant, length):
    compressor = make_compressor(variant, ratios=(4,))
    ids = random_ids(1, 4)[:, :length]
    (_, way) = list(ways_by_name(compressor).items())[-1]
    decoder, logits = way.prefill(ids, 4)
    document = make_document(compressor, ids)
    with torch.no_grad():
        store, last = encode(document), len(document.slots)
        hidden = compressor.read(document.segments[last], store.view(*document.schedule.span(last)))
        assert torch.allclose(logits, compressor.backbone.logits(hidden[:, -1]), atol=1e-10)
    assert decoder.length == way.slots(length)
    assert decoder.num_bytes == way.slots(length) * bytes_per_position(compressor.backbone)


def test_encoding_in_batches_equals_one_segment_at_a_time():
    compressor = make_compressor("uio", ratios=(4,))
    document = make_document(compressor, random_ids(1, 5))
    store = encode(document)
    for t in range(4):
        with torch.no_grad():
            alone = document.write(t, store)
        assert all(
            torch.allclose(a, b[..., store.bounds[t] : store.bounds[t + 1], :], atol=1e-12)
            for a, b in zip(alone, store.tensors, strict=True)
        )


def test_full_and_window_are_the_model_itself():
    compressor, ids = make_compressor("uio"), random_ids(1, 4)
    ways = ways_by_name(compressor)
    for name, seen in (("full", ids), ("window", ids[:, -24:])):
        decoder, logits = ways[name, None].prefill(ids, 4)
        with torch.no_grad():
            assert torch.allclose(logits, compressor.backbone.model(seen).logits[:, -1], atol=1e-10)
            following = torch.cat([seen, logits.argmax(-1, keepdim=True)], 1)
            again = decoder.next_logits(following[:, -1:])
            assert torch.allclose(again, compressor.backbone.model(following).logits[:, -1], atol=1e-10)


def test_points_hold_the_closed_forms():
    compressor = make_compressor("uio", tiny_llama(torch.float32), ratios=(2, 8), overlap=0)
    config = Efficiency(model="", lengths=(64, 33), num_new_tokens=2, num_repeats=1)
    ways = ways_of(compressor.backbone, compressor, (2, 8), window=24)
    known = [*compressor.backbone.model.parameters(), *compressor.parameters()]
    runs = []
    points = evaluate_efficiency(compressor.backbone, ways, config, known, runs.append)
    assert len(runs) == 2 * 4 * 2
    assert [(p.length, p.way, p.ratio) for p in points] == [
        (n, way, ratio) for n in (33, 64) for way, ratio in (("full", None), ("window", None), ("uio", 2), ("uio", 8))
    ]
    position = 2 * 3 * 2 * 8 * 4  # keys and values, layers, KV heads, head size, float32
    slots = {"full": 64, "window": 24, 2: 1 + 3 * SEGMENT // 2 + SEGMENT, 8: 1 + 3 * SEGMENT // 8 + SEGMENT}
    for point in points[4:]:
        assert point.kv_bytes == point.kv_bytes_formula == position * slots[point.ratio or point.way]
        assert point.kv_bytes_per_token == point.kv_bytes / 64
        assert point.prefill_tokens_per_second == pytest.approx(64 / point.prefill_seconds)
        assert point.peak_bytes > point.kv_bytes
    assert [p.marginal_bytes_formula for p in points[4:]] == [position, 0, position / 2, position / 8]


def test_peak_memory_of_full_attention_grows_and_that_of_the_window_does_not():
    compressor = make_compressor("uio", tiny_llama(torch.float32), ratios=(8,))
    config = Efficiency(model="", lengths=(64, 256), num_new_tokens=1, num_repeats=1)
    ways = ways_of(compressor.backbone, compressor, (8,), window=24)
    known = [*compressor.backbone.model.parameters(), *compressor.parameters()]
    peak = {(p.way, p.length): p.peak_bytes for p in evaluate_efficiency(compressor.backbone, ways, config, known)}
    assert peak["full", 256] > 3.5 * peak["full", 64]
    assert peak["window", 256] == peak["window", 64]


def test_a_note_names_what_goes_beyond_the_models_positions():
    compressor = make_compressor("uio", ratios=(4,), overlap=0)
    ways = ways_of(compressor.backbone, compressor, (4,), window=24)
    assert window_notes(compressor.backbone, ways, [64, 256]) == []
    (note,) = window_notes(compressor.backbone, ways, [2048, 64, 512])
    assert "256 positions" in note
    assert "full at 512, 2,048; uio 4x at 2,048." in note
