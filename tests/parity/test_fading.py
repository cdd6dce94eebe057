"""Ratios by distance and thinning in float64: the memory read is that of segments compressed at those ratios."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from compressors import (
    SEGMENT,
    compressor_reader,
    gradient_of,
    make_compressor,
    make_document,
    random_ids,
    tiny_llama,
)
from families import CONFIGS, save_tiny_model, save_tiny_tokenizer
from transformers import SmolLM3Config

from longext.compressor.config import CompressConfig
from longext.compressor.gradients import Sweep
from longext.compressor.memory import join
from longext.compressor.reading.readers import read_sizes
from longext.compressor.reading.session import Session
from longext.compressor.reading.trails import CompressorTrail
from longext.compressor.schedule import Schedule
from longext.compressor.segments import Segment, split_segments
from longext.compressor.settings import document_length, spec_of
from longext.compressor.train import plan_compressor
from longext.errors import ConfigError

NESTED = ["uio", "anchor"]
FADING = (2, 4, 8)


def fading_document(compressor, ids):
    """A document whose memories are read by distance."""
    segments = split_segments(ids, ids, compressor.spec, [FADING[0]] * (ids.shape[1] // SEGMENT))
    return Sweep(segments, compressor, 0.01, fading=FADING)


def schedule(ratios, *, room=10**9, thins=False, block=1, segment=16, overlap=0):
    return Schedule(
        segment=segment, ratios=ratios, by_distance=True, sink=1, fixed=1, overlap=overlap, room=room,
        capacity=room // (segment // ratios[-1]), thins=thins, block=block,
    )  # fmt: skip


def distance_ratio(ratios, distance):
    """1 memory at the first ratio, 2 at the second, 4 at the third, ...; the rest at the last."""
    for i, ratio in enumerate(ratios):
        distance -= 2**i
        if distance < 0:
            return ratio
    return ratios[-1]


@pytest.mark.parametrize("ratios", [(4,), (2, 4), (1, 2, 4, 8)])
def test_ratios_by_distance(ratios):
    for reader in range(40):
        found = schedule(ratios).ratios_at(reader)
        assert found == [distance_ratio(ratios, d) for d in reversed(range(reader))]


def thinned_by_hand(segment, ratios, room, count):
    """One memory at a time: while there are too many slots the longest run of far ones has its older half halved."""
    held = []
    for _ in range(count):
        held.append(ratios[0])
        held = [max(r, distance_ratio(ratios, d)) for r, d in zip(held, reversed(range(len(held))), strict=True)]
        while sum(segment // r for r in held) > room:
            far = held[: max(0, len(held) - (2 ** (len(ratios) - 1) - 1))]
            runs = [(r, len(list(group))) for r, group in itertools.groupby(far)]
            sizes = [segment // r * n if segment % (2 * r) == 0 else -1 for r, n in runs]
            if max(sizes) < 0:
                held.pop(0)
                continue
            start = sum(n for _, n in runs[: sizes.index(max(sizes))])
            r, n = runs[sizes.index(max(sizes))]
            held[start : start + -(-n // 2)] = [2 * r] * -(-n // 2)
    return held


@pytest.mark.parametrize(("ratios", "room"), [((4,), 24), ((4,), 9), ((1, 2, 4), 52), ((2, 8), 12)])
def test_thinning_keeps_all_text_in_the_room_there_is(ratios, room):
    one = schedule(ratios, room=room, thins=True)
    previous = {}
    for reader in range(60):
        found, (first, last) = one.ratios_at(reader), one.span(reader)
        assert found == thinned_by_hand(16, ratios, room, reader)
        assert last - first == len(found) and one.num_slots(reader) <= room
        assert found == sorted(found, reverse=True)
        now = dict(zip(range(first, last), found, strict=True))
        assert all(ratio >= previous.get(memory, 1) for memory, ratio in now.items()), "ratios never fall"
        assert first == 0 or set(found[: len(found) - 2 ** (len(ratios) - 1) + 1]) == {16}, "none leaves before"
        previous = now


def compressed(compressor, ids, ratios):
    """[sink | memories], each segment compressed by itself at its ratio, at the positions it is read at."""
    memories, place = [compressor.fixed(ids[:, :1])], 1
    for tokens, ratio in zip(ids.split(SEGMENT, 1), ratios, strict=True):
        memories.append(compressor.write(Segment(tokens, tokens, tokens[:, :0], tokens[:, :0], ratio), (), place))
        place += SEGMENT // ratio
    return join(memories)


@torch.no_grad()
@pytest.mark.parametrize("variant", NESTED)
@pytest.mark.parametrize(("ratios", "window"), [((2, 4, 8), 256), (4, 48), ((2, 4), 64)])
def test_what_is_read_is_what_was_compressed_at_those_ratios(variant, ratios, window):
    """Segment by segment, so that memories are thinned where they are: a stride and a turn of the keys."""
    compressor = make_compressor(variant, tiny_llama(max_position_embeddings=window), overlap=0)
    ids = random_ids(2, 14)
    trail = CompressorTrail(compressor, ratios, thins=True)
    seen = set()
    for t, tokens in enumerate(ids.split(SEGMENT, 1)):
        found, (first, last) = trail.schedule.ratios_at(t), trail.schedule.span(t)
        if t:
            expected = compressed(compressor, ids[:, first * SEGMENT : last * SEGMENT], found)
            expected = join([compressor.fixed(ids[:, :1]), tuple(x[..., 1:, :] for x in expected)])
            assert expected[0].shape[-2] + SEGMENT <= window
            for one, other in zip(trail._readable(), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=2e-6)  # angles are made in float32
            hidden = compressor.read(Segment(tokens, tokens, tokens[:, :0], ids[:, :1], 4), expected)
            torch.testing.assert_close(trail.read(tokens), hidden, rtol=0, atol=1e-5)
        trail.write(tokens)
        seen |= set(found)
    assert len(seen) > 2 - (window == 64 and ratios == 4)


@torch.no_grad()
def test_sessions_thin_alike_however_they_are_fed(tmp_path):
    compressor = make_compressor("uio", tiny_llama(max_position_embeddings=64))
    tokens = random_ids(1, 30)[0]
    slow, fast, sizes = Session(compressor), Session(compressor), []
    for part in tokens.split(7):
        slow.absorb(part)
        slow.logits()
        sizes.append(slow.num_slots)
    fast.absorb(tokens)
    assert max(sizes) <= 64 - SEGMENT - 1 - 3
    assert slow.num_forgotten == 0 and slow.num_thinned == fast.num_thinned > 0
    assert slow.trail.state.ratios == fast.trail.state.ratios
    torch.testing.assert_close(slow.logits(), fast.logits(), rtol=0, atol=1e-5)
    forgets = Session(compressor, when_full="forget")
    forgets.absorb(tokens)
    assert forgets.num_forgotten and not forgets.num_thinned


def test_readers_and_training_know_the_same_ratios():
    """A fading read of a text that one ratio covers is the read at that ratio, as training scores it."""
    compressor = make_compressor("uio", overlap=0)
    ids = random_ids(1, 6)
    one, other = compressor_reader(compressor, 4), compressor_reader(compressor, (4, 8))
    head = slice(0, 2 * SEGMENT - 1)
    torch.testing.assert_close(one.score(ids, 1).nll[:, head], other.score(ids, 1).nll[:, head])
    assert not torch.equal(one.score(ids, 1).nll, other.score(ids, 1).nll)
    assert make_document(compressor, ids).slots == [4, 2, 4, 2, 4]


def test_spellings_and_what_is_refused():
    assert read_sizes("x@", "2,4,8+256") == ((2, 4, 8), 256)
    assert read_sizes("x@", "8") == (8, None)
    for wrong in ("2,,4", "2,x", "0", "8+", ""):
        with pytest.raises(ConfigError, match="whole numbers"):
            read_sizes("x@", wrong)
    compressor = make_compressor("uio", tiny_llama(max_position_embeddings=64))
    for ratios, message in (((2, 3), "divide"), ((4, 2), "multiple"), ((2, 2), "multiple"), ((1, 2, 4, 8), "fit")):
        with pytest.raises(ConfigError, match=message):
            compressor.find_ratio(ratios)
    with pytest.raises(ConfigError, match="cannot"):
        make_compressor("gist").find_ratio((4, 8))
    with pytest.raises(ConfigError, match="cannot be thinned"):
        Session(make_compressor("gist"), when_full="thin")
    with pytest.raises(ConfigError, match="when_full must be"):
        Session(compressor, when_full="slide")


@pytest.mark.parametrize("variant", NESTED)
@pytest.mark.parametrize("overlap", [0, 3])
def test_training_reads_what_a_fading_memory_reads(variant, overlap):
    """The losses of a sweep are those of the reader, segment by segment."""
    compressor = make_compressor(variant, overlap=overlap, ratios=FADING)
    ids = random_ids(2, 9)
    document = fading_document(compressor, ids)
    trail = CompressorTrail(compressor, FADING)
    store = document.new_store()
    with torch.no_grad():
        document.write_all(store, range(8))
        for t, (segment, tokens) in enumerate(zip(document.segments, ids.split(SEGMENT, 1), strict=True)):
            loss, _ = document.read(t, store.view(*document.schedule.span(t)))
            expected = compressor.loss(trail.advance(tokens), segment)
            if document.is_scored(t):
                torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # angles are made in float32
    assert {4, 2, 8} == {r for t in range(9) for r in document.schedule.ratios_at(t)}


@pytest.mark.parametrize("variant", NESTED)
def test_gradients_of_a_fading_memory_are_exact(variant):
    compressor = make_compressor(variant, ratios=FADING)
    document = fading_document(compressor, random_ids(2, 9))
    loss, whole = gradient_of(compressor, document, "full")
    for policy in ("exact", "window:9", "stop:99"):
        found, gradient = gradient_of(compressor, document, policy)
        assert found == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-10 * float(whole.norm()))
    same = fading_document(compressor, random_ids(2, 9))
    same.fading = ()
    same.__post_init__()
    assert not torch.allclose(gradient_of(compressor, same, "exact")[1], whole)


def test_keys_that_cannot_be_turned_cannot_be_trained_to_fade(tmp_path):
    """SmolLM3 has layers without rotation: its memories are read, but not at other positions."""
    sizes = {**CONFIGS["llama"]().to_dict(), "model_type": "smollm3", "no_rope_layers": [1, 0]}
    save_tiny_model(SmolLM3Config(**sizes), tmp_path / "m")
    save_tiny_tokenizer(tmp_path / "m")
    given = {"model": str(tmp_path / "m"), "data": "sample", "device": "cpu", "arch": "anchor", "segment": 8}
    plan = plan_compressor(CompressConfig(**given, ratio=(2, 4), fading=True))
    with pytest.raises(ConfigError, match="ratios by distance"):
        plan.load(tmp_path)


def test_training_that_cannot_fade_says_so():
    config = CompressConfig(model="m", data="d", arch="anchor", segment=16, ratio=(8,), fading=True)
    with pytest.raises(ConfigError, match="--fading needs several ratios, the nearest first"):
        spec_of(config, 512)
    with pytest.raises(ConfigError, match="cannot: give one ratio, or train uio or anchor"):
        spec_of(dataclasses.replace(config, arch="gist", ratio=(4, 8)), 512)
    faded = spec_of(dataclasses.replace(config, ratio=(2, 8)), 128)
    assert document_length(dataclasses.replace(config, ratio=(2, 8), document_length=40 * 16), faded, 128) == 640
    with pytest.raises(ConfigError, match="at ratio 2,8 needs sink 1 \\+ 206 slots"):
        document_length(dataclasses.replace(config, ratio=(2, 8), document_length=101 * 16), faded, 128)
