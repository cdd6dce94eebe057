"""What tokens gain from far text, and the loss that is weighed by it, against their definitions token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compressors import SEGMENT, VARIANTS, make_compressor, random_ids, tiny_llama
from families import tiny_model
from sweeps import batch_of, gradients, worst

from longext.compressor.objectives import Batch, Objectives, compare_gradients
from longext.compressor.policies import parse_objectives, parse_policy
from longext.data.long_short import is_key, long_short, longce_weights, short_context, short_step
from longext.errors import ConfigError
from longext.training.config import FinetuneConfig
from longext.training.losses import IGNORED, _recomputed, chunked_cross_entropy
from longext.training.settings import check_finetune_config


def loss_of(model, tokens):
    """The loss of the last of tokens [n] given those before it, by the model's own logits."""
    return F.cross_entropy(model(tokens[None, :-1]).logits[0, -1:], tokens[-1:])


def score_by(model):
    def score(ids, first):
        logits = model(ids).logits[:, first - 1 : -1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, first:].flatten(), reduction="none").view(len(ids), -1)

    return score


@pytest.mark.parametrize(("context", "step"), [(8, 2), (5, 3), (1, 1), (12, 40)])
@torch.no_grad()
def test_every_token_is_read_with_a_short_context_and_with_all(context, step):
    model, tokens = tiny_llama(), random_ids(2, 2)[:, :23]
    gain, whole = long_short(score_by(model), tokens, context, step)
    for row in range(2):
        for p in range(1, 23):
            block = (p - 1) // step * step + 1  # first token of the step
            short = loss_of(model, tokens[row, max(0, block - context) : p + 1])
            full = loss_of(model, tokens[row, : p + 1])
            assert float(whole[row, p - 1]) == pytest.approx(float(full), abs=1e-12)
            assert float(gain[row, p - 1]) == pytest.approx(float(short - full), abs=1e-12)
            assert context <= p - max(0, block - context) < context + step or block <= context


def test_key_tokens_and_weights_of_the_paper():
    """Gain above 2 nats and loss below 2; min(exp(gain), 5)."""
    gain, loss = torch.tensor([2.1, 2.0, 2.1, 9.0, -1.0]), torch.tensor([1.9, 1.0, 2.0, 0.1, 0.1])
    assert is_key(gain, loss).tolist() == [True, False, False, True, False]
    weights = longce_weights(torch.tensor([0.0, 1.0, -1.0, math.log(5), 2.0, 80.0], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([1, math.e, 1 / math.e, 5, 5, 5], dtype=torch.float64))
    assert (short_context(32768), short_step(4096)) == (4096, 1024)  # the paper's
    assert (short_context(512), short_step(128), short_context(512, 7)) == (128, 32, 7)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("ignored", [3, 50])
def test_a_weighed_loss_in_chunks_is_the_weighed_sum(chunk, ignored):
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(16, 33, dtype=torch.float64)
    labels, weights = torch.randint(0, 33, (50,)), torch.rand(50, dtype=torch.float64) * 5
    labels[::ignored] = IGNORED
    inputs = [hidden, *head.parameters()]
    each = F.cross_entropy(head(hidden), labels, reduction="none", ignore_index=IGNORED)
    expected = (each * weights)[labels != IGNORED].sum()
    wanted = torch.autograd.grad(2.5 * expected, inputs)
    for function in (
        lambda: chunked_cross_entropy(hidden, labels, head, list(head.parameters()), chunk, weights),
        lambda: _recomputed(hidden, labels, head, chunk, weights),
    ):
        found = function()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(2.5 * found, inputs), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["whole", "masked"])
@pytest.mark.parametrize("variant", ["s2", "full"])
def test_a_swept_row_has_the_gradient_of_the_weighed_loss(variant, kind):
    model, batch = tiny_model("qwen3").double(), batch_of(kind)
    weights = torch.rand(batch["labels"].shape, dtype=torch.float64) * 5
    loss, expected = gradients(model, batch, variant, weights=weights)
    swept, found = gradients(model, batch, variant, 16, weights=weights)
    torch.testing.assert_close(swept, loss, rtol=1e-12, atol=0)
    assert worst(found, expected) < 1e-10
    if variant == "full":
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        each = F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), labels.flatten(), reduction="none")
        wanted = (each * weights.flatten()).sum() / (labels != IGNORED).sum()
        model.zero_grad()
        wanted.backward()
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
        assert worst(found, {name: p.grad for name, p in model.named_parameters()}) < 1e-10


@torch.no_grad()
def dense_weights(model, tokens, window, overlap):
    """The weights of a row's labels [N - 1]: short is the segment so far and the overlap, long the window."""
    weights = []
    for p in range(1, len(tokens)):
        start = (p - 1) // SEGMENT * SEGMENT  # of the segment whose output predicts token p
        far, near = max(0, start + SEGMENT - window), max(0, start - overlap)
        gain = loss_of(model, tokens[near : p + 1]) - loss_of(model, tokens[far : p + 1])
        weights.append(float(gain.exp().clamp(max=5)))
    return torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("window", [256, 48])
def test_a_compressor_s_weights_are_those_of_its_frozen_model(window):
    compressor = make_compressor("uio", tiny_llama(max_position_embeddings=window))
    ids = random_ids(1, 4)[:, :-5]
    compressor.backbone.config.max_position_embeddings = window
    found = Objectives({"longce": 1.0}, parse_policy("exact"), 0)._label_weights(compressor, ids)
    wanted = dense_weights(compressor.backbone.model, ids[0], window, compressor.spec.overlap)
    torch.testing.assert_close(found[0, :-1].double(), wanted, rtol=1e-5, atol=1e-6)  # scores are float32
    assert found.std() > 0.01  # not all alike


@pytest.mark.parametrize("variant", ["uio", "beacon"])
def test_weighed_objectives_keep_the_exact_gradient(variant):
    assert variant in VARIANTS
    compressor, ids = make_compressor(variant), random_ids(2, 3)
    batch = Batch(ids, ids, torch.tensor([ids.shape[1]] * 2), 0, 1 / ids.numel(), 0.5)
    objectives = Objectives(parse_objectives("longce:1,distill:0.5"), parse_policy("exact"), 0)
    assert compare_gradients(compressor, objectives, batch)["relative_error"] < 1e-10
    parts = objectives.backward(compressor, batch)
    plain = Objectives(parse_objectives("lm:1,distill:0.5"), parse_policy("exact"), 0).backward(compressor, batch)
    assert abs(float(parts["documents"] - plain["documents"])) > 1e-3


def test_the_weighed_loss_of_a_compressor_is_the_weighed_sum_of_its_tokens():
    compressor, ids = make_compressor("uio"), random_ids(1, 2)
    objectives = Objectives({"longce": 0.7}, parse_policy("exact"), 0)
    weights = objectives._label_weights(compressor, ids).double()
    batch = Batch(ids, ids, torch.tensor([ids.shape[1]]), 0, 1.0, 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for p in range(SEGMENT, ids.shape[1] - 1):  # the first segment reads no memory, so it trains nothing
        labels = torch.full_like(ids, IGNORED)
        labels[:, p + 1] = ids[:, p + 1]
        one = Objectives({"lm": 0.7}, parse_policy("exact"), 0)
        part = one.backward(compressor, Batch(ids, labels, batch.num_tokens, 0, 1.0, 1.0))
        total += weights[0, p] * part["documents"].double()
    torch.testing.assert_close(objectives.backward(compressor, batch)["documents"].double(), total, rtol=1e-9, atol=0)


def test_what_longce_is_not_defined_for_is_refused():
    plain = {"model": "books-5m", "data": "sample", "method": "linear", "target_length": 1024, "loss": "longce"}
    check_finetune_config(FinetuneConfig(**plain))
    for change, text in (
        ({"task": "sft"}, "leave --task sft out"),
        ({"separate_documents": True}, "leave `separate_documents` out"),
        ({"positions": "pose", "window": 256}, "leave --positions pose out"),
        ({"loss": "plain", "short_context": 128}, "add it, or leave it out"),
    ):
        with pytest.raises(ConfigError, match=text):
            check_finetune_config(FinetuneConfig(**{**plain, **change}))
    with pytest.raises(ConfigError, match="lm and longce are ways to score the same tokens"):
        parse_objectives("longce,lm")
