"""KV policies against slow references written from their definitions, in float64.

The references use transformers' own eager attention weights, a cache kept by hand head by head, and complex numbers.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from compressors import random_ids, tiny_llama
from families import CONFIGS, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from longext.compressor.backbone import Backbone
from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.kv_policies.attention_matching import RIDGE
from longext.compressor.reading.kv_memory import open_policy
from longext.compressor.reading.readers import Reader
from longext.compressor.reading.seen import Seen
from longext.errors import ConfigError
from longext.models.hf import HFLanguageModel, score_hidden
from longext.planning.tracker import MemoryTracker

CHUNK = 16
THETA = 10_000.0


def trail(spec, model, chunk=CHUNK):
    return open_policy(Backbone(model), spec, chunk)[0]()


def reader(spec, model, chunk=CHUNK):
    opened, _, budget = open_policy(Backbone(model), spec, chunk)
    return Reader(HFLanguageModel("tiny", model, None, {}, Path()), spec, chunk, opened, size=budget.at)


def rope(x, positions):
    """Rotate [..., n, d] by its positions, by the definition."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * THETA ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def close(ours, theirs, atol=3e-6):
    np.testing.assert_allclose(ours.double().numpy(), theirs.double().numpy(), rtol=0, atol=atol)


# --- the definitions, for one head: attention [G, q, n + probes], keys [n, d], numbers -> (scores, what always stays)


def mean_of(rows):
    return sum(rows) / len(rows)


def snapkv(attention, keys, numbers, budget, state, layer_attention, newest=None):
    window = newest or max(1, min(64, budget // 4))
    old = len(keys) - window
    of_heads = []
    for head in attention:
        mean = mean_of([row[:old] for row in head[-window:]])
        padded = [0.0, 0.0, *mean.tolist(), 0.0, 0.0]
        of_heads.append([sum(padded[i : i + 5]) / 5 for i in range(old)])
    return [*np.mean(of_heads, 0), *([0.0] * window)], set(range(old, len(keys)))


def h2o(attention, keys, numbers, budget, state, layer_attention):
    now = numbers[-1] + 1
    for i, number in enumerate(numbers):
        received = sum(float(head[:, i].sum()) for head in attention) / len(attention)
        state[number] = state.get(number, 0.0) + received
    scores = [state[number] / (now - number) for number in numbers]
    return scores, {i for i, number in enumerate(numbers) if number >= now - budget // 2}


def tova(attention, keys, numbers, budget, state, layer_attention):
    return mean_of([head[-1] for head in layer_attention]).tolist(), {len(keys) - 1}


def knorm(attention, keys, numbers, budget, state, layer_attention):
    return [-float(key.square().sum().sqrt()) for key in keys], set()


def keydiff(attention, keys, numbers, budget, state, layer_attention):
    mean = mean_of([key / key.norm() for key in keys])
    return [-float(key @ mean / key.norm() / mean.norm()) for key in keys], set()


def kvzip(attention, keys, numbers, budget, state, layer_attention):
    for i, number in enumerate(numbers):
        state[number] = max(state.get(number, 0.0), float(attention[:, :, i].max()))
    return [state[number] for number in numbers], set()


def streaming(attention, keys, numbers, budget, state, layer_attention):
    return [float(number) for number in numbers], {i for i, number in enumerate(numbers) if number < 4}


DEFINITIONS = {f.__name__: f for f in (snapkv, h2o, tova, knorm, keydiff, kvzip, streaming)}


def even(scores, always, budget):
    """[heads] of which keys stay: the best of each head."""
    order = [sorted(range(len(s)), key=lambda i: (i in a, s[i]))[-budget:] for s, a in zip(scores, always, strict=True)]
    return [sorted(one) for one in order]


def ada(scores, always, budget):
    """The best of all heads together, a fifth of the even share for each."""
    order = (sorted(range(len(s)), key=lambda i: (i in a, s[i])) for s, a in zip(scores, always, strict=True))
    safe = [set(one[-int(0.2 * budget) :]) for one in order]
    rank = lambda h, i: (i in always[h] or i in safe[h], scores[h][i])  # noqa: E731
    pairs = sorted(((h, i) for h, s in enumerate(scores) for i in range(len(s))), key=lambda pair: rank(*pair))
    chosen = pairs[max(0, len(pairs) - budget * len(scores)) :]
    return [sorted(i for head, i in chosen if head == h) for h in range(len(scores))]


def attend(model, tokens, start, cache, masks=None):
    """One pass of the eager model, each layer with a mask of its own."""
    set_mask = lambda mask: lambda _, args, kwargs: (args, {**kwargs, "attention_mask": mask})  # noqa: E731
    hooks = [
        layer.self_attn.register_forward_pre_hook(set_mask(mask), with_kwargs=True)
        for layer, mask in zip(model.model.layers, masks or (), strict=False)
    ]
    positions = start + torch.arange(tokens.shape[1])[None]
    out = model.model(input_ids=tokens, position_ids=positions, past_key_values=cache, output_attentions=True)
    for hook in hooks:
        hook.remove()
    return out


@torch.no_grad()
def slow(model, ids, budget, name, choose=even, chunk=CHUNK, newest=None):
    """The last hidden states [1, T, D] of one text; a cache of lists, and the weights of transformers' attention.

    With `newest` so many stay besides, instead of those of the definition.
    """
    more = {"newest": newest} if name == "snapkv" else {}
    model.set_attn_implementation("eager")
    layers, heads = len(model.model.layers), model.config.num_key_value_heads
    groups = model.config.num_attention_heads // heads
    held = [[[] for _ in range(heads)] for _ in range(layers)]  # entries (raw key, value, number)
    states = [[{} for _ in range(heads)] for _ in range(layers)]
    budgets = budget if isinstance(budget, list) else [budget] * layers
    found = []
    for begin in range(0, ids.shape[1], chunk):
        tokens = ids[:, begin : begin + chunk]
        start = max(len(one) for layer in held for one in layer)
        cache = DynamicCache()
        causal = torch.full((tokens.shape[1], start + tokens.shape[1]), -torch.inf, dtype=torch.float64).triu(start + 1)
        masks = [causal.repeat(1, heads * groups, 1, 1) for _ in held]
        for number, layer in enumerate(held if start else ()):
            keys, values = [], []
            for head, one in enumerate(layer):
                empty = start - len(one)
                masks[number][:, head * groups : (head + 1) * groups, :, :empty] = -torch.inf
                blank = [(torch.zeros_like(one[0][0]), torch.zeros_like(one[0][1]), -1)] * empty
                raw, value, _ = zip(*blank, *one, strict=True)
                keys.append(rope(torch.stack(raw), torch.arange(start)))
                values.append(torch.stack(value))
            cache.update(torch.stack(keys)[None], torch.stack(values)[None], number)
        out = attend(model, tokens, start, cache, masks)
        found.append(out.last_hidden_state)
        if name == "kvzip":
            out = attend(model, tokens, start + tokens.shape[1], cache)
        for number in range(layers):
            total = start + tokens.shape[1]
            keys, values = (x[0, :, :total] for x in (cache.layers[number].keys, cache.layers[number].values))
            weights = out.attentions[number][0].double()
            rows = []
            for head in range(heads):
                empty = start - len(held[number][head])
                numbers = [entry[2] for entry in held[number][head]] + list(range(begin, begin + tokens.shape[1]))
                own = weights[head * groups : (head + 1) * groups, :, empty:]
                rows.append(
                    DEFINITIONS[name](
                        own, keys[head, empty:], numbers, budgets[number], states[number][head], weights[:, :, empty:],
                        **more,
                    )
                )  # fmt: skip
                if newest is not None:
                    rows[-1] = rows[-1][0], set(range(len(numbers) - newest, len(numbers)))
            kept = choose([row[0] for row in rows], [row[1] for row in rows], budgets[number])
            raw = rope(keys, -torch.arange(total))
            for head in range(heads):
                empty = start - len(held[number][head])
                numbers = [entry[2] for entry in held[number][head]] + list(range(begin, begin + tokens.shape[1]))
                held[number][head] = [(raw[head, empty + i], values[head, empty + i], numbers[i]) for i in kept[head]]
    model.set_attn_implementation("sdpa")
    return torch.cat(found, 1)


def distinct_ids(rows, chunks):
    """Tokens that come once: equal tokens have equal keys in the first layer, and equal scores."""
    draw = torch.Generator().manual_seed(0)
    return torch.stack([3 + torch.randperm(197, generator=draw)[: CHUNK * chunks] for _ in range(rows)])


def qwen3():
    config = CONFIGS["qwen3"]()
    config.max_position_embeddings, config.rope_parameters = 256, {"rope_type": "default", "rope_theta": THETA}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():  # queries and keys that differ: scores without ties
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_llama, qwen3])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_policy_is_its_definition(name, make):
    """Five chunks of two texts with 20 slots a head, GQA, several layers; scored chunk by chunk."""
    model = make()
    ids = random_ids(2, 5)
    one = trail(f"{name}:20", model)
    ours = torch.cat([one.advance(tokens) for tokens in ids.split(CHUNK, 1)], 1)
    for row in range(2):
        close(ours[row], slow(model, ids[row : row + 1], 20, name)[0])
    heads, width = one.layers[0].held[0].shape[1::2]
    assert one.num_slots == 20 and one.num_bytes == 2 * 2 * heads * 20 * width * 8 * len(one.layers)


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "kvzip", "knorm"])
def test_heads_share_a_layers_budget(name):
    model = tiny_llama(vocab_size=200)
    ids = distinct_ids(2, 5)
    one = trail(f"ada-{name}:20", model)
    ours = torch.cat([one.advance(tokens) for tokens in ids.split(CHUNK, 1)], 1)
    for row in range(2):
        close(ours[row], slow(model, ids[row : row + 1], 20, name, ada)[0])
    counts = torch.stack([(layer.origins >= 0).sum(-1) for layer in one.layers])
    assert (counts.sum(-1) == 40).all() and counts.min() >= 4 and (counts != 20).any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_layers_share_a_pyramid(name):
    model = tiny_llama()
    ids = random_ids(2, 5)
    one = trail(f"pyramid-{name}:20", model)
    ours = torch.cat([one.advance(tokens) for tokens in ids.split(CHUNK, 1)], 1)
    assert [layer.num_held for layer in one.layers] == [39, 20, 1]
    for row in range(2):
        close(ours[row], slow(model, ids[row : row + 1], [39, 20, 1], name)[0])


@torch.no_grad()
@pytest.mark.parametrize("spec", ["snapkv:12+8", "h2o:12+8", "keydiff:12+8", "kvzip:20+0", "pyramid-knorm:12+8"])
def test_newest_tokens_stay_besides(spec):
    """Eight newest in every layer and the rest by score; none where the policy itself keeps half for them."""
    model, ids = tiny_llama(), random_ids(2, 5)
    name, _, sizes = spec.removeprefix("pyramid-").partition(":")
    newest = int(sizes.partition("+")[2])
    one = trail(spec, model)
    ours = torch.cat([one.advance(tokens) for tokens in ids.split(CHUNK, 1)], 1)
    held = [31, 20, 9] if spec.startswith("pyramid") else [20] * 3
    assert [layer.num_held for layer in one.layers] == held
    for row in range(2):
        close(ours[row], slow(model, ids[row : row + 1], held, name, newest=newest)[0])


# --- expected attention and attention matching: one layer's states ----------------------------------------------------


def random_seen(num_probes=0, bias=False, budget=6, count=5, first=3):
    draw = torch.Generator().manual_seed(2)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    total = 12 + num_probes
    held = torch.cat([make(2, 2, 4), torch.zeros(2, 2, total - 4, dtype=torch.float64)], -1) if bias else None
    return Seen(
        keys=make(2, 2, total, 8), values=make(2, 2, total, 8), queries=make(2, 2, 3, count, 8), bias=held, scale=0.4,
        cap=None, turn=lambda x, by: rope(x, by.expand(x.shape[-2])), budget=budget, window=40, num_probes=num_probes,
        origins=torch.arange(12).expand(2, 2, -1), num_read=12, first=first,
    )  # fmt: skip


def test_expected_attention_is_the_expectation():
    seen = random_seen(count=12, first=0)
    policy = KV_POLICIES["expected"]()
    found = policy.score(seen)
    for b, h in itertools.product(range(2), range(2)):
        of_groups = []
        for g in range(3):
            plain = rope(seen.queries[b, h, g], -torch.arange(12))
            mean = plain.mean(0)
            covariance = sum(torch.outer(q - mean, q - mean) for q in plain) / 12
            matrix = sum(rope(torch.eye(8).double(), torch.full((8,), 12 + t)).T for t in range(34)) / 34
            mean, covariance = matrix @ mean, matrix @ covariance @ matrix.T
            logits = torch.stack([0.4 * k @ mean + 0.08 * k @ covariance @ k for k in seen.keys[b, h]])
            of_groups.append(logits.exp() / logits.exp().sum())
        close(found[b, h], mean_of(of_groups) * seen.values[b, h].norm(dim=-1), 1e-10)
    again = random_seen(count=12, first=0)
    again.notes = seen.notes
    policy.score(again)
    assert float(again.notes["count"]) == 24


def test_a_fit_does_not_depend_on_how_many_keys_other_heads_hold():
    seen = random_seen(num_probes=5)
    index = torch.tensor([2, 5, 7]).expand(2, 2, -1)
    padded = torch.nn.functional.pad(index, (2, 0))
    policy = KV_POLICIES["attention-matching"]()
    alone = policy.fit(seen, index, torch.ones_like(index, dtype=torch.bool))
    beside = policy.fit(seen, padded, padded > 0)
    close(beside[0][..., 2:, :], alone[0], 1e-12)
    close(beside[1][..., 2:], alone[1], 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_matching_is_its_two_fits(bias):
    seen = random_seen(num_probes=5, bias=bias)
    policy = KV_POLICIES["attention-matching"]()
    scores = policy.score(seen)
    index = scores.topk(6, -1).indices.sort(-1).values
    values, biases = policy.fit(seen, index, torch.ones_like(index, dtype=torch.bool))
    for b, h in itertools.product(range(2), range(2)):
        rows, exps = [], []
        for g, q in itertools.product(range(3), range(5)):
            raw = seen.queries[b, h, g, q] @ seen.keys[b, h].T * 0.4
            raw = raw + (seen.bias[b, h] if bias else 0)
            rows.append((raw[: 12 + q + 1].exp() / raw[: 12 + q + 1].exp().sum())[:12])
            exps.append((raw[:12] - raw[:12].max()).exp())
        close(scores[b, h], torch.stack(rows).square().mean(0).sqrt(), 1e-12)
        exp, chosen = torch.stack(exps), index[b, h]
        start = seen.bias[b, h, chosen].exp() if bias else torch.ones(6).double()
        weights = ridge(exp[:, chosen] / start, exp.sum(1, keepdim=True), start[:, None]).clamp(np.e**-3, np.e**7)
        bare = exp[:, chosen] / start
        for _ in range(2):
            weights = weights - bare.T @ (bare @ weights - exp.sum(1, keepdim=True)) / bare.square().sum()
            weights = weights.clamp(np.e**-3, np.e**7)
        close(biases[b, h], weights[:, 0].log(), 1e-9)
        x = bare * weights[:, 0]
        target = exp @ seen.values[b, h, :12] / exp.sum(1, keepdim=True)
        close(values[b, h], ridge(x / x.sum(1, keepdim=True), target, seen.values[b, h, chosen]), 1e-9)


def ridge(matrix, target, start):
    """argmin |A X - Y|^2 + r |X - S|^2 as one least-squares problem."""
    size = RIDGE * matrix.square().sum() / min(matrix.shape)
    rows = torch.cat([matrix, size.sqrt() * torch.eye(matrix.shape[1]).double()])
    return torch.linalg.lstsq(rows, torch.cat([target, size.sqrt() * start])).solution


@torch.no_grad()
def test_attention_matching_outputs_are_nearer_than_those_of_the_keys_alone():
    model = tiny_llama()
    ids = random_ids(2, 5, seed=3)
    whole = model.model(input_ids=ids).last_hidden_state[:, -CHUNK:]
    errors = {}
    for name in ("attention-matching", "kvzip"):
        one = trail(f"{name}:24", model)
        for tokens in ids[:, :-CHUNK].split(CHUNK, 1):
            one.write(tokens)
        shift = one.read(ids[:, -CHUNK:]) - whole
        errors[name] = float(shift.square().mean())
    assert errors["attention-matching"] < errors["kvzip"]


# --- chunks, families, questions, memory ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["streaming", "knorm"])
def test_chunks_choose_what_one_pass_chooses(name):
    """Scores that depend on a token and its place alone, keys that depend on no other: a model of one layer."""
    model = tiny_llama(num_hidden_layers=1, vocab_size=200)
    ids = distinct_ids(2, 6)
    chunked, at_once = trail(f"{name}:20", model), trail(f"{name}:20", model)
    for tokens in ids.split(CHUNK, 1):
        chunked.write(tokens)
    at_once.write(ids)
    assert torch.equal(chunked.layers[0].origins, at_once.layers[0].origins)
    new = random_ids(2, 1, seed=9)
    close(chunked.read(new), at_once.read(new))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "olmo2", "mistral"])
def test_in_every_family_what_fits_is_full_attention(family):
    """Query norms, capped scores, fused projections, partial rotary, layers with a window of their own."""
    model = tiny_model(family).double().eval()
    window = Backbone(model).window
    ids = torch.randint(3, 60, (2, window - 5))
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()[:, :-1]
    expected = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for spec in (f"snapkv:{window - 4}", f"ada-h2o:{window - 4}"):
        np.testing.assert_allclose(reader(spec, model, 4).score(ids, 1).nll, expected, rtol=2e-6, atol=2e-6)
    for name in KV_POLICIES:
        assert torch.isfinite(reader(f"ada-{name}:{window // 2 - 4}", model, 4).score(ids, 1).nll).all(), name


def test_a_ratio_grows_with_the_text_up_to_the_window():
    model = tiny_llama()
    one = trail("knorm:4x", model)
    sizes = []
    for tokens in random_ids(1, 70).split(CHUNK, 1):
        one.write(tokens)
        sizes.append(one.num_slots)
    assert sizes == [min(4 * (i + 1), 256 - CHUNK) for i in range(70)]


@torch.no_grad()
def test_a_question_is_seen_before_keys_go():
    """snapkv-aware scores by the question, which is read behind every chunk and not kept."""
    model = tiny_llama()
    ids, question = random_ids(1, 4), random_ids(1, 1, seed=5)
    one = trail("snapkv-aware:20", model)
    one.ask(question)
    expected = [one.advance(tokens) for tokens in ids.split(CHUNK, 1)]
    assert one.num_read == 64 and int(one.layers[0].origins.max()) < 64
    other = trail("snapkv-aware:20", model)
    with pytest.raises(ConfigError, match="chooses by a question"):
        other.advance(ids[:, :CHUNK])
    other.ask(random_ids(1, 1, seed=6))
    found = [other.advance(tokens) for tokens in ids.split(CHUNK, 1)]
    close(found[0], expected[0])
    assert not torch.equal(one.layers[1].origins, other.layers[1].origins)
    # a reader takes the end of what is given, and never what it scores
    text = torch.cat([ids, question], 1)
    scores = reader("snapkv-aware:20", model).score(text, 65).nll
    last = trail("snapkv-aware:20", model)
    last.ask(text[:, 1:65])
    for tokens in ids.split(CHUNK, 1):
        last.write(tokens)
    close(scores, score_hidden(model, last.read(question[:, :-1]), question[:, 1:]).nll)


def test_generation_is_what_scores_call_first():
    model = tiny_llama()
    model.generation_config.eos_token_id = [-1]
    prompt = random_ids(1, 3)[0, :45].tolist()
    for spec in ("snapkv:20", "attention-matching:20", "ada-kvzip:20", "pyramid-h2o:20"):
        one = reader(spec, model)
        new = one.greedy(prompt, 9)
        assert one.score(torch.tensor([[*prompt, *new]]), len(prompt)).is_top1.all(), spec
        assert len(new) == 9


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv", "h2o", "streaming", "ada-snapkv"])
def test_peak_memory_is_the_budget(name):
    """512 slots in chunks of 32, read layer by layer: what is held, and all tensors that operators make.

    Heads that keep fewer keys than others take no more room; the copy that a layer is read from is one layer's of 32.
    """
    sizes = {"num_hidden_layers": 32, "hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 4096}
    model = tiny_llama(torch.float32, **sizes)
    one = trail(f"{name}:512", model, 32)
    position = 32 * 2 * 2 * 64 * 4
    ids = torch.randint(3, 64, (1, 512 + 64), generator=torch.Generator().manual_seed(1))
    one.write(ids[:, :512])
    with MemoryTracker(list(model.parameters())) as tracker:
        for layer in one.layers:
            layer.held = tuple(states.clone() for states in layer.held)
        for tokens in ids[:, 512:].split(32, 1):
            one.write(tokens)
            assert one.num_bytes == 512 * position
    widest = max(layer.num_held for layer in one.layers)
    assert (widest > 512) == name.startswith("ada-")
    assert tracker.peak <= 1.1 * (512 + 32) * position, tracker.peak / (512 + 32) / position


@torch.no_grad()
def test_a_chunk_takes_no_more_room_than_its_tokens():
    model = tiny_llama()
    one = trail("streaming:20", model)
    decoder, _ = one.begin(random_ids(1, 1), 3)
    assert [layer._buffers[0].shape[-2] for layer in one.layers] == [CHUNK + 3] * 3
    assert decoder.num_bytes == 3 * 2 * 2 * CHUNK * 8 * 8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv", "slots or a ratio"),
        ("snapkv:0", "slots or a ratio"),
        ("snapkv:8y", "slots or a ratio"),
        ("snapkv:250", "at most 240 slots"),
        ("kvzip:230", "read again"),
        ("pyramid-snapkv:200", "at most 120 slots"),
        ("snapkv:200+64", "at most 176 slots beside 64 newest"),
        ("snapkv:200+", "newest tokens that stay besides"),
        ("h2o-aware:8", "scores by no query"),
    ],
)
def test_what_cannot_be_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        trail(spec, tiny_llama())
