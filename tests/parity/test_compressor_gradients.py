"""Gradients through memories: exact against autograd and against a UIO written out by hand; policies by their terms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressors import (
    INDEPENDENT,
    SEGMENT,
    VARIANTS,
    flat_gradient,
    gradient_of,
    make_compressor,
    make_document,
    random_ids,
    tiny_llama,
)
from families import CONFIGS, tiny_model

from longext.compressor import gradients
from longext.compressor.policies import POLICIES, parse_policy

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
EXACT, UNBIASED, BIASED = {"exact", "full"}, {"reservoir", "subset"}, {"window", "reservoir-raw", "stop"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_equals_autograd_through_one_graph(variant):
    compressor = make_compressor(variant)
    document = make_document(compressor, random_ids(2, 6))
    loss, expected = gradient_of(compressor, document, "full")
    found_loss, found = gradient_of(compressor, document, "exact")
    assert found_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found, expected, **TIGHT)
    assert expected.norm() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_trained(variant):
    """A parameter without a gradient would be dead weight (the last layer's encoder LoRA of the released UIO is)."""
    compressor = make_compressor(variant)
    gradient_of(compressor, make_document(compressor, random_ids(2, 4)), "exact")
    dead = [name for name, p in compressor.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == ["repeat"]


@pytest.mark.parametrize("variant", INDEPENDENT)
def test_windows_as_long_as_the_document_and_all_memories_equal_exact(variant):
    compressor = make_compressor(variant)
    document = make_document(compressor, random_ids(1, 5))
    _, expected = gradient_of(compressor, document, "exact")
    for policy in ("window:4", "reservoir:4", "reservoir-raw:9", "subset:4", "stop:5"):
        torch.testing.assert_close(gradient_of(compressor, document, policy)[1], expected, **TIGHT)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in INDEPENDENT])
def test_stop_cuts_recurrent_gradients_at_block_borders(variant):
    """Against autograd with memories detached at the borders."""
    compressor = make_compressor(variant)
    document = make_document(compressor, random_ids(1, 6))
    _, found = gradient_of(compressor, document, "stop:2")
    compressor.zero_grad()
    made, losses = [], []
    fixed = document.new_store().fixed
    for t in range(6):
        first, last = document.schedule.span(t)
        cut = [tuple(x if s // 2 == t // 2 else x.detach() for x in made[s]) for s in range(first, last)]
        memory = gradients.join([fixed if first == 0 else (), *cut])
        loss, written = document.read(t, memory, write=t < 5)
        losses.append(loss)
        made.append(written)
    (torch.stack(losses).sum() * document.scale).backward()
    torch.testing.assert_close(found, flat_gradient(compressor), **TIGHT)


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "falcon"])
def test_exact_on_every_family(family):
    narrow = family == "mixtral"  # torch's grouped expert product knows no float64
    model = tiny_model(family, attention="eager").to(torch.float32 if narrow else torch.float64)
    compressor = make_compressor("uio", model, segment=4, ratios=(2, 4), overlap=0)
    ids = torch.randint(3, 61, (2, 12))
    document = make_document(compressor, ids)
    loss, expected = gradient_of(compressor, document, "full")
    assert gradient_of(compressor, document, "exact")[0] == pytest.approx(loss, rel=1e-6 if narrow else 1e-10)
    tolerance = {"rtol": 1e-4, "atol": 1e-7} if narrow else {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(flat_gradient(compressor), expected, **tolerance)


# --- UIO written out, on the weights of the model alone ---------------------------------------------------------------


def rms(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x, positions):
    frequencies = 10_000.0 ** (-torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
    angles = positions.to(x.dtype)[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def heads(x, count):
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def forward_by_hand(model, embeds, positions, mask, adapters, prefix):
    """Every layer of the Llama in plain torch; returns (attention inputs by layer, final hidden states)."""
    x, inputs = embeds, []
    for index, layer in enumerate(model.model.layers):
        attention, h = layer.self_attn, rms(x, layer.input_layernorm.weight)
        inputs.append(h)

        def project(name, index=index, attention=attention, h=h):
            out = F.linear(h, getattr(attention, f"{name}_proj").weight)
            extra = adapters.get(f"{index}_{name}_proj")
            return out if extra is None else out + F.linear(F.linear(h, extra.A), extra.B) * extra.scale

        q, k, v = heads(project("q"), 4), heads(project("k"), 2), heads(project("v"), 2)
        q, k = rotate(q, positions), rotate(k, positions)
        if prefix is not None:
            k, v = torch.cat([prefix[index][0], k], 2), torch.cat([prefix[index][1], v], 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(out, attention.o_proj.weight)
        h = rms(x, layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        up = F.silu(F.linear(h, mlp.gate_proj.weight)) * F.linear(h, mlp.up_proj.weight)
        x = x + F.linear(up, mlp.down_proj.weight)
    return inputs, rms(x, model.model.norm.weight)


def uio_by_hand(model, compressor, ids, ratio):
    """Loss of a document under UIO-LLMs (section 3.2, the released mask and positions), in one graph."""
    slots, table = SEGMENT // ratio, model.model.embed_tokens.weight
    encoder, transfer = compressor.adapters.sets["encoder"], compressor.adapters.sets["transfer"]
    text = torch.arange(SEGMENT)
    reach = (torch.arange(slots) + 1) * ratio
    sees = torch.zeros(SEGMENT + slots, SEGMENT + slots, dtype=torch.bool)
    sees[:SEGMENT, :SEGMENT] = text[:, None] >= text
    sees[SEGMENT:, :SEGMENT] = text < reach[:, None]
    sees[SEGMENT:, SEGMENT:] = torch.eye(slots, dtype=torch.bool)
    memories, total = [], 0.0
    for t, segment in enumerate(ids.split(SEGMENT, 1)):
        if t:
            prefix = [[torch.cat([m[i][j] for m in memories], 2) for j in (0, 1)] for i in range(3)]
            past = t * slots
            mask = torch.cat([torch.ones(SEGMENT, past, dtype=torch.bool), text[:, None] >= text], 1)
            _, hidden = forward_by_hand(model, F.embedding(segment, table), past + text, mask, {}, prefix)
            targets = ids[:, t * SEGMENT + 1 : (t + 1) * SEGMENT + 1]
            logits = F.linear(hidden[:, : targets.shape[1]], table)
            total = total + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        probes = compressor.vector.expand(len(ids), slots, -1)
        embeds = torch.cat([F.embedding(segment, table), probes], 1)
        inputs, _ = forward_by_hand(model, embeds, torch.cat([text, reach]), sees, dict(encoder.items()), None)
        memory = []
        for index, h in enumerate(inputs):
            h, attention = h[:, SEGMENT:], model.model.layers[index].self_attn
            k, v = transfer[f"{index}_k_proj"], transfer[f"{index}_v_proj"]
            keys = F.linear(h, attention.k_proj.weight) + F.linear(F.linear(h, k.A), k.B) * k.scale
            values = F.linear(h, attention.v_proj.weight) + F.linear(F.linear(h, v.A), v.B) * v.scale
            memory.append((rotate(heads(keys, 2), t * slots + torch.arange(slots)), heads(values, 2)))
        memories.append(memory)
    return total


def test_uio_equals_one_written_out_by_hand():
    model = tiny_llama()
    compressor = make_compressor("uio", model, ratios=(4,), sink=0, overlap=0)
    ids = random_ids(2, 5)
    loss, found = gradient_of(compressor, make_document(compressor, ids, scale=1.0), "exact")
    compressor.zero_grad()
    expected = uio_by_hand(model, compressor, ids, 4)
    assert loss == pytest.approx(expected.item(), rel=1e-8)  # transformers makes cos and sin in float32
    expected.backward()
    torch.testing.assert_close(found, flat_gradient(compressor), rtol=1e-5, atol=1e-6)


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def terms():
    """z_ts of one document: the gradient by pair of reader and memory, and the executor that made them."""
    compressor = make_compressor("uio", overlap=0)
    document = make_document(compressor, random_ids(1, 6), scale=1.0)
    pairs = {}
    for s, t in itertools.combinations(range(6), 2):
        weights = np.zeros((6, 6))
        weights[t, s] = 1.0
        compressor.zero_grad()
        gradients._stream(document, weights)
        pairs[t, s] = flat_gradient(compressor)
    _, exact = gradient_of(compressor, document, "exact")
    return compressor, document, pairs, exact


def test_the_terms_of_all_pairs_add_up_to_the_gradient(terms):
    _, _, pairs, exact = terms
    torch.testing.assert_close(sum(pairs.values()), exact, **TIGHT)


def weighted(pairs, weights):
    return sum(float(weights[t, s]) * z for (t, s), z in pairs.items())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [2, 3])
def test_a_policy_is_the_weighted_sum_of_its_terms(terms, name, size):
    """Stream, sweep and graph alike, draw for draw."""
    compressor, document, pairs, _ = terms
    policy = f"{name}:{size}" if POLICIES[name].size else name
    for seed in range(3):
        weights = parse_policy(policy).draw(document.visible, np.random.default_rng(seed))
        found = gradient_of(compressor, document, policy, seed)[1]
        torch.testing.assert_close(found, weighted(pairs, weights), **TIGHT)


def mean_weights(policy, draws, visible):
    rng = np.random.default_rng(0)
    samples = np.stack([parse_policy(policy).draw(visible, rng) for _ in range(draws)])
    return samples.mean(0), samples.std(0) / np.sqrt(draws)


@pytest.mark.parametrize("policy", ["reservoir:1", "reservoir:2", "reservoir:3", "subset:2"])
def test_sampling_policies_are_unbiased(policy):
    """E W = 1 for every pair within 4.5 standard errors: without the factor the worst pair is hundreds away."""
    visible = list(range(8))
    mean, error = mean_weights(policy, 20_000, visible)
    for s, t in itertools.combinations(range(8), 2):
        assert mean[s, t] == 0  # a segment never reaches a later memory
        assert abs(mean[t, s] - 1) <= 4.5 * max(error[t, s], 1e-12), (t, s)


def test_raw_reservoir_and_window_are_biased_by_their_analytic_amounts(terms):
    compressor, document, pairs, exact = terms
    for size in (1, 2):
        mean, _ = mean_weights(f"reservoir-raw:{size}", 20_000, document.visible)
        for t, s in pairs:
            assert mean[t, s] == pytest.approx(min(1.0, size / t), abs=0.02)
        bias = weighted(pairs, mean) - exact
        analytic = sum((min(1.0, size / t) - 1.0) * z for (t, s), z in pairs.items())
        assert float((bias - analytic).norm() / exact.norm()) < 0.02
        assert float(analytic.norm() / exact.norm()) > 0.1
    found = gradient_of(compressor, document, "window:2")[1]
    missing = -sum(z for (t, s), z in pairs.items() if t - s > 2)
    torch.testing.assert_close(found - exact, missing, **TIGHT)


def test_compensated_reservoir_gradient_is_unbiased_in_the_mean(terms):
    """The mean of 4,000 drawn gradients, projected on the exact one, is 1 within 4 standard errors."""
    _, document, pairs, exact = terms
    rng = np.random.default_rng(1)
    along = {key: float(z @ exact / (exact @ exact)) for key, z in pairs.items()}

    def standard_errors_from_one(policy):
        drawn = (parse_policy(policy).draw(document.visible, rng) for _ in range(4000))
        values = [sum(weights[pair] * a for pair, a in along.items()) for weights in drawn]
        return abs(np.mean(values) - 1) / (np.std(values) / np.sqrt(len(values)))

    assert standard_errors_from_one("reservoir:2") < 4
    assert standard_errors_from_one("reservoir-raw:2") > 40


def test_no_segment_is_encoded_with_a_graph_for_nothing(terms):
    compressor, document, _, _ = terms
    seen = []
    encode = type(compressor).encode

    def counting(self, *args):
        memory = encode(self, *args)
        seen.append(memory[0].requires_grad)
        return memory

    compressor.encode = counting.__get__(compressor)
    try:
        for seed in range(5):
            seen.clear()
            weights = parse_policy("reservoir:1").draw(document.visible, np.random.default_rng(seed))
            gradient_of(compressor, document, "reservoir:1", seed)
            assert sum(seen) == sum(bool(weights[:, s].any()) for s in range(5))
    finally:
        del compressor.encode


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_described_and_its_bias_tested(name):
    assert POLICIES.summary(name)
    assert (name in EXACT) + (name in UNBIASED) + (name in BIASED) == 1, "test what it is in the mean, and say so here"
