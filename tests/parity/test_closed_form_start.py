"""What a new anchor and a new `matching` compressor read before training: raw keys thinned, and the closed form."""

from __future__ import annotations

import pytest
import torch
from compressors import SEGMENT, make_spec, random_ids, tiny_llama
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from longext.compressor.backbone import Backbone
from longext.compressor.base import build_compressor
from longext.compressor.kv_policies.attention_matching import RIDGE
from longext.errors import ConfigError


def new(variant, **keys):
    return build_compressor(Backbone(tiny_llama()), make_spec(variant, **keys)).double()


def raw_states(model, tokens):
    """(queries, keys, values) of each layer, as attention gets them."""
    seen = []

    def attend(module, query, key, value, *args, **kwargs):
        seen.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recording", attend)
    before, model.config._attn_implementation = model.config._attn_implementation, "recording"
    with torch.no_grad():
        model.model(tokens)
    model.config._attn_implementation = before
    return seen


def closed_form(queries, keys, values, places):
    """C of one head by normal equations: queries [q, d], keys and values [l, d] of a segment."""
    scores = queries @ keys.T * queries.shape[-1] ** -0.5
    target = scores.softmax(-1) @ values
    attention = scores[:, places].softmax(-1)
    ridge = RIDGE * attention.square().sum() / min(attention.shape)
    gram = attention.T @ attention + ridge * torch.eye(len(places), dtype=torch.float64)
    return torch.linalg.solve(gram, attention.T @ target + ridge * values[places])


@pytest.mark.parametrize("ratio", [4, 8])
def test_before_training_the_memory_is_the_closed_form(ratio):
    matching, anchor = new("matching"), new("anchor")
    tokens, places = random_ids(2, 1), torch.arange(ratio - 1, SEGMENT, ratio)
    found = matching.encode(tokens, ratio, torch.tensor([1, 5]))
    plain = anchor.encode(tokens, ratio, torch.tensor([1, 5]))
    once = raw_states(matching.backbone.model, tokens)
    twice = raw_states(matching.backbone.model, torch.cat([tokens, tokens], 1))
    for layer, ((_, _, values), (queries, keys, _)) in enumerate(zip(once, twice, strict=True)):
        torch.testing.assert_close(plain[2 * layer + 1], values[:, :, places], rtol=0, atol=1e-10)
        torch.testing.assert_close(found[2 * layer], plain[2 * layer], rtol=0, atol=1e-10)
        groups = queries.shape[1] // keys.shape[1]
        for row in range(2):
            for head in range(keys.shape[1]):
                own = queries[row, head * groups : (head + 1) * groups, SEGMENT:].flatten(0, 1)
                wanted = closed_form(own, keys[row, head, :SEGMENT], values[row, head], places)
                torch.testing.assert_close(found[2 * layer + 1][row, head], wanted, rtol=0, atol=1e-10)
        assert (found[2 * layer + 1] - plain[2 * layer + 1]).norm() > 0.1 * plain[2 * layer + 1].norm()


def test_a_segment_that_cannot_be_read_twice_is_refused():
    with pytest.raises(ConfigError, match="--segment of at most 128"):
        new("matching", segment=136)
