"""Readers against transformers' own full attention, a hand-written cache and the training document (float64)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compressors import SEGMENT, VARIANTS, compressor_reader, document_nll, make_compressor, random_ids, tiny_llama
from families import CONFIGS, tiny_model

from longext.compressor.backbone import Backbone
from longext.compressor.gradients import Sweep
from longext.compressor.memory import join
from longext.compressor.reading.readers import MEMORIES, Reader
from longext.compressor.reading.trails import CompressorTrail
from longext.compressor.segments import split_segments
from longext.errors import ConfigError, DataError
from longext.evals.memory.controls import METHODS, CompressorControls, ReaderControls
from longext.evals.memory.next_segment import choose_places, evaluate_memory, gather_texts
from longext.models.hf import HFLanguageModel, score_hidden

RTOL = 2e-6  # scores are float32, and so is the rotation of keys


def reader(spec, segment=SEGMENT, model=None):
    """A reader of an untrained memory on a tiny model."""
    plain = HFLanguageModel("tiny", tiny_llama() if model is None else model, None, {}, Path())
    name, _, argument = spec.partition(":")
    open_trail, size = MEMORIES[name].open(Backbone(plain.model), argument, segment)
    return Reader(plain, spec, segment, open_trail, size=size)


@torch.no_grad()
def full_nll(model, ids):
    """NLL [B, T - 1] of tokens 1 .. from the model's own float64 logits over the whole text."""
    logits = model(input_ids=ids).logits.double()[:, :-1]
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def close(ours, theirs, rtol=RTOL):
    np.testing.assert_allclose(ours.double().numpy(), theirs.double().numpy(), rtol=rtol, atol=1e-6)


# --- everything fits: full attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["window:192", "streaming:4+188", "streaming:0+192", "transformer-xl:192"])
@pytest.mark.parametrize(("length", "first"), [(100, 1), (97, 64), (96, 33), (81, 80)])
def test_a_memory_that_holds_everything_is_full_attention(spec, length, first):
    ids = random_ids(2, 8)[:, :length]
    model = tiny_llama()
    close(reader(spec, model=model).score(ids, first).nll, full_nll(model, ids)[:, first - 1 :])


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"falcon", "mixtral"}))
def test_every_family_reads_by_segments_as_a_whole(family):
    """Partial rotary, query norms, fused projections, local layers: what fits the window is full attention."""
    model = tiny_model(family).double().eval()
    window = Backbone(model).window
    ids = torch.randint(3, 60, (2, window - 1))
    for spec in (f"window:{window - 4}", f"streaming:2+{window - 6}"):
        close(reader(spec, 4, model).score(ids, 1).nll, full_nll(model, ids))
    evicted = reader("streaming:2+5", 4, model).score(ids, 1).nll
    close(evicted[:, :7], full_nll(model, ids)[:, :7])
    assert torch.isfinite(evicted).all()


def test_none_scores_each_segment_by_itself():
    ids = random_ids(2, 4)
    model = tiny_llama()
    nll = reader("none", model=model).score(ids, 1).nll
    for start in range(0, ids.shape[1] - 1, SEGMENT):
        end = min(start + SEGMENT, ids.shape[1] - 1)
        close(nll[:, start:end], full_nll(model, ids[:, start : end + 1]))
    for nothing in ("window:0", "streaming:0+0", "transformer-xl:0"):
        close(reader(nothing, model=model).score(ids, 1).nll, nll)


def test_window_sees_the_last_tokens_at_positions_from_zero():
    ids = random_ids(2, 6)
    model = tiny_llama()
    nll = reader("window:20", model=model).score(ids, 1).nll
    for start in range(0, ids.shape[1] - 1, SEGMENT):
        end = min(start + SEGMENT, ids.shape[1] - 1)
        seen = full_nll(model, ids[:, max(0, start - 20) : end + 1])
        close(nll[:, start:end], seen[:, -(end - start) :])


@pytest.mark.parametrize("spec", ["none", "window:20", "streaming:2+20", "transformer-xl:20"])
def test_a_later_start_gives_the_same_scores(spec):
    ids = random_ids(2, 5)
    one = reader(spec)
    every = one.score(ids, 1)
    for first in (16, 17, 30, 79):
        some = one.score(ids, first)
        close(some.nll, every.nll[:, first - 1 :])
        assert torch.equal(some.is_top1, every.is_top1[:, first - 1 :])


# --- eviction: a reference by hand ------------------------------------------------------------------------------------


def rope(x, positions, theta):
    """Rotate [H, n, d] by its positions, by the definition: complex numbers."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


class OneLayer:
    """A one-layer Llama written out: states before rotation are kept, and rotated at every use."""

    def __init__(self, model):
        self.model, self.layer = model, model.model.layers[0]
        config = model.config
        self.heads, self.kv, self.theta = config.num_attention_heads, config.num_key_value_heads, 10_000.0
        self.keys = self.values = None

    def step(self, token, num_sinks, size):
        """Logits after `token`, which sees the cache and itself at positions 0, 1, ...; then evict."""
        embedded = self.model.model.embed_tokens(torch.tensor([token]))
        attention = self.layer.self_attn
        hidden = self.layer.input_layernorm(embedded)
        split = lambda x, n: x.view(1, n, -1).transpose(0, 1)  # noqa: E731
        query = split(attention.q_proj(hidden), self.heads)
        key, value = (split(p(hidden), self.kv) for p in (attention.k_proj, attention.v_proj))
        self.keys = key if self.keys is None else torch.cat([self.keys, key], 1)
        self.values = value if self.values is None else torch.cat([self.values, value], 1)
        count = self.keys.shape[1]
        place = torch.arange(count)
        keys = rope(self.keys, place, self.theta).repeat_interleave(self.heads // self.kv, 0)
        values = self.values.repeat_interleave(self.heads // self.kv, 0)
        scores = rope(query, place[-1:], self.theta) @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        mixed = (scores.softmax(-1) @ values).transpose(0, 1).reshape(1, -1)
        after = embedded + attention.o_proj(mixed)
        after = after + self.layer.mlp(self.layer.post_attention_layernorm(after))
        if count > num_sinks + size:
            stay = [*range(num_sinks), *range(count - size, count)]
            self.keys, self.values = self.keys[:, stay], self.values[:, stay]
        return self.model.lm_head(self.model.model.norm(after))[0]


@torch.no_grad()
@pytest.mark.parametrize(("num_sinks", "size"), [(4, 12), (0, 12), (1, 30)])
def test_streaming_by_single_tokens_is_the_papers(num_sinks, size):
    model = tiny_llama(num_hidden_layers=1)
    ids = random_ids(1, 5)
    layer = OneLayer(model)
    logits = torch.stack([layer.step(int(token), num_sinks, size) for token in ids[0, :-1]])
    nll = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    ours = reader(f"streaming:{num_sinks}+{size}", segment=1, model=model).score(ids, 1).nll[0]
    np.testing.assert_allclose(ours.numpy(), nll.numpy(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("spec", "num_sinks", "size"), [("streaming:4+24", 4, 24), ("transformer-xl:24", 0, 24)])
def test_a_moving_cache_is_transformers_own_with_its_keys_turned_by_definition(spec, num_sinks, size):
    """Three layers: keys are kept unrotated, and turned by complex numbers to where the cache has them."""
    from transformers import DynamicCache

    model = tiny_llama(attn_implementation="eager")
    ids = random_ids(2, 7)
    kept, parts = None, []
    for start in range(0, ids.shape[1], SEGMENT):
        cache = DynamicCache()
        past = 0 if kept is None else kept[0][0].shape[2]
        for layer, (keys, values) in enumerate(kept or []):
            turned = torch.stack([rope(row, torch.arange(past), 10_000.0) for row in keys])
            cache.update(turned, values, layer)
        tokens = ids[:, start : start + SEGMENT]
        output = model(input_ids=tokens, past_key_values=cache, position_ids=torch.arange(past, past + SEGMENT)[None])
        parts.append(output.logits.log_softmax(-1))
        states = []
        for layer in range(3):
            keys, values = cache.layers[layer].keys, cache.layers[layer].values
            plain = torch.stack([rope(row, -torch.arange(past + SEGMENT), 10_000.0) for row in keys])
            stay = list(range(past + SEGMENT))
            if len(stay) > num_sinks + size:
                stay = [*stay[:num_sinks], *stay[-size:]]
            states.append((plain[:, :, stay], values[:, :, stay]))
        kept = states
    nll = -torch.cat(parts, 1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    close(reader(spec).score(ids, 1).nll, nll, rtol=1e-5)


# --- what cannot be seen does not matter ------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "unseen"), [("none", 63), ("window:20", 43), ("window:32", 31)])
def test_a_token_out_of_reach_changes_nothing(spec, unseen):
    ids = random_ids(1, 5)
    one = reader(spec)
    before = one.score(ids, 65).nll
    for place in range(unseen + 1):
        other = ids.clone()
        other[0, place] = 3 + (ids[0, place] + 1) % 50
        assert torch.equal(one.score(other, 65).nll, before), place
    other = ids.clone()
    other[0, unseen + 1] = 3 + (ids[0, unseen + 1] + 1) % 50
    assert not torch.equal(one.score(other, 65).nll, before)


def test_evicted_tokens_live_on_in_what_saw_them():
    ids = random_ids(1, 5)
    other = ids.clone()
    other[0, 40] = 3 + (ids[0, 40] + 1) % 50
    one = reader("streaming:0+16")  # token 40 is gone at 64, but tokens 48 .. 63 have seen it
    assert not torch.equal(one.score(ids, 65).nll, one.score(other, 65).nll)


# --- compressors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 3, 20])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_compressor_reads_as_in_training(variant, overlap):
    compressor = make_compressor(variant, overlap=overlap)
    ids = random_ids(2, 6)
    close(compressor_reader(compressor).score(ids, 1).nll, document_nll(compressor, ids, 4))


def test_a_rope_that_follows_the_length_is_read_as_it_was_trained():
    """Scoring must not put a LongRoPE that a compressor holds at its window back to that of short texts."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, **factors}
    compressor = make_compressor("uio", tiny_llama(rope_parameters=rope))
    ids = random_ids(2, 6)
    expected = document_nll(compressor, ids, 4)
    close(compressor_reader(compressor).score(ids, 1).nll, expected)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_losses_are_those_of_the_document(variant):
    compressor = make_compressor(variant)
    ids = random_ids(2, 5)
    segments = split_segments(ids, ids, compressor.spec, [4] * 5)
    document = Sweep(segments, compressor)
    store = document.new_store()
    with torch.no_grad():
        for t in range(4):
            store.put(t, document.write(t, store))
        nll = compressor_reader(compressor).score(ids, 1).nll
        for t in range(1, 5):
            loss, _ = document.read(t, store.view(*document.schedule.span(t)))
            own = nll[:, t * SEGMENT : (t + 1) * SEGMENT]
            assert float(own.double().sum()) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("variant", ["uio", "icae", "icae-kv", "prefix"])
def test_beyond_the_window_the_newest_memories_stay(variant):
    """At ratio 2 the window of 128 holds (128 - 1 - 3 - 16) // 8 = 13 memories; the text then starts later."""
    model = tiny_llama(max_position_embeddings=128)
    compressor = make_compressor(variant, model, ratios=(2, 4))
    ids = random_ids(2, 18)
    one = compressor_reader(compressor, 2)
    assert CompressorTrail(compressor, 2).schedule.capacity == 13
    late = one.score(ids, 17 * SEGMENT + 1).nll
    # the same text without its first four segments, but for the sink: the first token of the whole
    shorter = torch.cat([ids[:, :1], ids[:, 4 * SEGMENT + 1 : 17 * SEGMENT]], 1)
    with torch.no_grad():
        memory = CompressorTrail(compressor, 2, ids[:, 4 * SEGMENT : 17 * SEGMENT]).memory()
        hidden = CompressorTrail(compressor, 2, shorter).read_with(ids[:, 17 * SEGMENT : -1], memory)
        expected = score_hidden(compressor.backbone.model, hidden, ids[:, 17 * SEGMENT + 1 :]).nll
    close(late, expected, rtol=1e-5)
    # scored from an earlier segment on, the memories have been written further behind and have moved since
    close(one.score(ids, 12 * SEGMENT).nll[:, -late.shape[1] :], late, rtol=1e-5)


@pytest.mark.parametrize("variant", ["beacon", "autocompressor"])
def test_recurrent_memories_slide_too(variant):
    model = tiny_llama(max_position_embeddings=64)
    compressor = make_compressor(variant, model, ratios=(4,), overlap=0)
    one = compressor_reader(compressor)
    ids = random_ids(1, 20)
    nll = one.score(ids, 1).nll
    assert torch.isfinite(nll).all()
    assert CompressorTrail(compressor, 4).schedule.capacity == (11 if variant == "beacon" else 10)
    fits = random_ids(1, 20)[:, : 10 * SEGMENT]
    close(nll[:, : 10 * SEGMENT - 1], document_nll(compressor, fits, 4))


def test_recurrent_keys_move_with_their_memories():
    """A beacon memory of one old segment: dropping the oldest and turning keys is writing it one place earlier."""
    compressor = make_compressor("beacon", sink=0, overlap=0, ratios=(4,))
    ids = random_ids(1, 4)
    trail = CompressorTrail(compressor, 4)
    with torch.no_grad():
        for tokens in ids.split(SEGMENT, 1):
            trail.write(tokens)
        made = [tensor[..., -8:, :] for tensor in trail.memory()]
        trail.schedule = dataclasses.replace(trail.schedule, capacity=2)
        moved = trail.memory()
    assert moved[0].shape[-2] == 8
    for index, (tensor, own) in enumerate(zip(moved, made, strict=True)):
        if index % 2:
            assert torch.equal(tensor, own)
        else:
            turned = torch.stack([rope(row, torch.full((8,), -8), 10_000.0) for row in own])
            close(tensor, turned, rtol=1e-5)


def test_greedy_is_what_score_calls_first():
    compressor = make_compressor("uio")
    for one in (reader("none"), reader("window:20"), reader("streaming:2+20"), compressor_reader(compressor)):
        one.plain.model.generation_config.eos_token_id = None
        prompt = random_ids(1, 3)[0, :45].tolist()
        new = one.greedy(prompt, 9)
        assert len(new) == 9
        assert one.score(torch.tensor([[*prompt, *new]]), len(prompt)).is_top1.all()
        one.plain.model.generation_config.eos_token_id = [new[3]]
        assert one.greedy(prompt, 9) == new[: new.index(new[3]) + 1]


def is_greedy(one, prompt, count):
    """Return whether each of `count` new tokens is the first choice where the text is scored as a whole."""
    one.plain.model.generation_config.eos_token_id = [-1]  # none that can come
    new = one.greedy(prompt, count)
    return len(new) == count and bool(one.score(torch.tensor([[*prompt, *new]]), len(prompt)).is_top1.all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_compressor_generates_what_its_scores_call_first(variant):
    one = compressor_reader(make_compressor(variant))
    for length in (5, 16, 17, 45, 64):  # in the first segment, at a border, behind it, overlap and sink in play
        assert is_greedy(one, random_ids(1, 5)[0, :length].tolist(), 20), length


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"falcon", "mixtral"}))
def test_every_family_generates_what_its_scores_call_first(family):
    model = tiny_model(family).double().eval()
    prompt = torch.randint(3, 60, (19,)).tolist()
    for spec in ("none", "window:9", "streaming:2+5"):
        assert is_greedy(reader(spec, 4, model), prompt, 11), spec


# --- the protocol next-segment ----------------------------------------------------------------------------------------


def documents(count=3, segments=20):
    return [random_ids(1, segments, seed)[0].tolist() for seed in range(count)]


def by_method(rows, length):
    return {row.method: row for row in rows if row.length == length}


def test_places_are_spread_seeded_and_apart():
    sizes = (1000, 200, 90, 333)
    places = choose_places(sizes, 64, 16, 12, 0)
    assert places == choose_places(sizes, 64, 16, 12, 0)
    assert places != choose_places(sizes, 64, 16, 12, 1)
    for document, size in enumerate(sizes):
        starts = [place.start for place in places if place.document == document]
        assert len(starts) == min(12, (size - 64) // 16)
        assert all(64 <= start <= size - 16 for start in starts)
        assert all(b - a >= 16 for a, b in zip(starts, starts[1:], strict=False))
    with pytest.raises(DataError, match="80 tokens"):
        choose_places((79,), 64, 16, 12, 0)


def test_partners_are_of_another_document():
    texts = gather_texts(documents(3), choose_places([320] * 3, 64, 16, 4, 0), 64, 16)
    assert all(texts.groups[partner] != group for partner, group in zip(texts.partners, texts.groups, strict=True))
    alone = gather_texts(documents(1), choose_places([320], 64, 16, 5, 0), 64, 16)
    assert alone.partners == [2, 3, 4, 0, 1]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("overlap", [0, 3, 20])
def test_memory_at_a_length_is_the_reader_on_the_cut_text(variant, overlap):
    """Memories written once for the longest context and turned equal those of each length by itself."""
    compressor = make_compressor(variant, overlap=overlap)
    lengths = (0, 16, 48, 96)
    places = choose_places([320] * 3, 96, 16, 4, 0)
    texts = gather_texts(documents(), places, 96, 16)
    controls = CompressorControls(compressor, 4, texts)
    one = compressor_reader(compressor)
    with torch.no_grad():
        for length in (96, 48, 16, 0):
            ids = torch.cat([texts.contexts[:, 96 - length :], texts.segments], 1)
            close(controls.score("memory", length).nll, one.score(ids, length + 1).nll, rtol=1e-5)
            if overlap == compressor.spec.sink == 0:  # those stay the text's own
                swapped = torch.cat([texts.contexts[texts.partners, 96 - length :], texts.segments], 1)
                close(controls.score("wrong document", length).nll, one.score(swapped, length + 1).nll, rtol=1e-5)
    rows = evaluate_memory(compressor, documents(), lengths, 4, num_bootstrap=20)
    assert {row.length for row in rows} == set(lengths)
    assert {row.method for row in rows} == set(METHODS)


def test_without_context_every_memory_is_none_bit_for_bit():
    compressor = make_compressor("uio")
    texts = gather_texts(documents(), choose_places([320] * 3, 64, 16, 4, 0), 64, 16)
    ids = texts.segments
    none = reader("none", model=compressor.backbone.model)
    expected = none.score(ids, 1).nll
    with torch.no_grad():
        for spec in ("window:64", "streaming:4+60", "transformer-xl:64"):
            other = reader(spec, model=compressor.backbone.model)
            assert torch.equal(other.score(ids, 1).nll, expected), spec
            assert torch.equal(ReaderControls(other, texts).score("memory", 0).nll, expected)
        for method in METHODS:
            assert torch.equal(CompressorControls(compressor, 4, texts).score(method, 0).nll, expected), method
        for length in (16, 64):
            assert torch.equal(CompressorControls(compressor, 4, texts).score("no memory", length).nll, expected)


def test_a_constant_memory_is_its_own_wrong_document_and_mean():
    rows = evaluate_memory(make_compressor("prefix"), documents(), (0, 64), 4, num_bootstrap=50)
    own = by_method(rows, 64)
    for method in ("wrong document", "constant prefix"):
        assert own[method].nll == pytest.approx(own["memory"].nll, rel=1e-6)
        assert own[method].difference == pytest.approx(0, abs=1e-6)
        assert own[method].difference_high - own[method].difference_low < 1e-5  # paired: nothing of the spread is left
    assert own["memory"].ppl_high - own["memory"].ppl_low > 1e-3
    assert own["memory"].difference is None


def test_the_constant_prefix_leaves_the_own_document_out():
    compressor = make_compressor("uio")
    texts = gather_texts(documents(2), choose_places([320] * 2, 64, 16, 4, 0), 64, 16)
    controls = CompressorControls(compressor, 4, texts)
    with torch.no_grad():
        memory = controls._memory(64)
        mean = controls._constant(memory, 0)
    assert mean[0].shape == (1, *memory[0].shape[1:])
    close(mean[0][0], memory[0][4:].mean(0))


def test_windows_are_the_models_own_attention_of_that_many_tokens():
    compressor = make_compressor("uio", overlap=16)
    texts = gather_texts(documents(), choose_places([320] * 3, 96, 16, 4, 0), 96, 16)
    controls = CompressorControls(compressor, 4, texts)
    assert controls.num_readable(96) == 1 + 5 * 4 + 16
    model = compressor.backbone.model
    with torch.no_grad():
        for method, size in (("window (same KV)", 37), ("window (all that fits)", 96)):
            ids = torch.cat([texts.contexts[:, 96 - size :], texts.segments], 1)
            close(controls.score(method, 96).nll, full_nll(model, ids)[:, size:])


def test_same_kv_is_what_the_memory_keeps():
    for variant in VARIANTS:
        compressor = make_compressor(variant, overlap=20)
        spec = compressor.spec
        texts = gather_texts(documents(), choose_places([320] * 3, 96, 16, 2, 0), 96, 16)
        with torch.no_grad():
            trail = CompressorTrail(compressor, 4)
            for tokens in texts.contexts.split(SEGMENT, 1):
                trail.write(tokens)
            slots = join([trail.memory()])[0].shape[-2]
        expected = spec.sink + slots + 20
        assert CompressorControls(compressor, 4, texts).num_readable(96) == expected, variant


def test_differences_are_paired_and_intervals_are_of_documents_from_eight_on():
    compressor = make_compressor("uio")
    few = by_method(evaluate_memory(compressor, documents(2), (32,), 3, num_bootstrap=50), 32)
    many = by_method(evaluate_memory(compressor, documents(8), (32,), 2, num_bootstrap=50), 32)
    assert few["memory"].resampled == "places"
    assert many["memory"].resampled == "documents"
    for own in (few, many):
        for method in METHODS[1:]:
            row = own[method]
            assert row.difference == pytest.approx(own["memory"].nll - row.nll, abs=1e-9)
            assert row.difference_low <= row.difference <= row.difference_high
            assert row.num_tokens == own["memory"].num_tokens == row.num_places * (SEGMENT - 1)
            assert sum(d["num_tokens"] for d in row.per_document) == row.num_tokens


def test_readers_are_compared_in_the_same_way():
    one = reader("window:40")
    rows = evaluate_memory(one, documents(), (0, 32, 96), 3, num_bootstrap=20)
    assert "constant prefix" not in {row.method for row in rows}
    own = by_method(rows, 96)
    assert own["memory"].num_readable == 40
    assert own["memory"].nll == pytest.approx(own["window (same KV)"].nll, rel=1e-6)
    assert by_method(rows, 32)["memory"].nll == pytest.approx(
        by_method(rows, 32)["window (all that fits)"].nll, rel=1e-6
    )


def test_wrong_lengths_ratios_and_places_are_refused():
    compressor = make_compressor("icae")
    with pytest.raises(ConfigError, match="multiples of the segment 16"):
        evaluate_memory(compressor, documents(), (0, 24))
    with pytest.raises(ConfigError, match="ratio 2: this icae compressor was trained at 4, 8"):
        evaluate_memory(compressor, documents(), (0, 32), ratio=2)
    with pytest.raises(ConfigError, match="does not divide"):
        evaluate_memory(make_compressor("uio"), documents(), (0, 32), ratio=3)
    with pytest.raises(DataError, match="two places"):
        evaluate_memory(compressor, documents(1, 3), (32,))
    rows = evaluate_memory(compressor, documents(1, 3), (32,), methods=("memory", "no memory"), num_bootstrap=0)
    assert [row.resampled for row in rows] == [None, None]
