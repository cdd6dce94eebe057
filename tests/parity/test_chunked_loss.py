"""The chunked loss against the model's own loss: value and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import CONFIGS, tiny_model

from longext.training.losses import _recomputed, chunked_cross_entropy, chunked_loss, shift


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("ignored", [3, 50])
def test_equals_cross_entropy_in_float64(chunk, trained, ignored):
    hidden = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(16, 33, dtype=torch.float64).requires_grad_(trained)
    labels = torch.randint(0, 33, (50,))
    labels[::ignored] = -100
    parameters = [p for p in head.parameters() if p.requires_grad]

    def exact(states):  # the loss is float32 by design; keep its input exact
        return head(states)

    ours = chunked_cross_entropy(hidden, labels, exact, parameters, chunk)
    (2.5 * ours).backward()
    found = [hidden.grad.clone(), *(p.grad.clone() for p in parameters)]
    for x in (hidden, *parameters):
        x.grad = None
    expected = F.cross_entropy(head(hidden), labels, reduction="sum")
    (2.5 * expected).backward()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(found, [hidden.grad, *(p.grad for p in parameters)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_recomputed_form_equals_the_other():
    hidden = torch.randn(20, 8, requires_grad=True)
    head = torch.nn.Linear(8, 11)
    labels = torch.randint(0, 11, (20,))
    results = []
    for loss in (
        chunked_cross_entropy(hidden, labels, head, list(head.parameters()), 6),
        _recomputed(hidden, labels, head, 6),
    ):
        gradients = torch.autograd.grad(loss, [hidden, *head.parameters()])
        results.append((loss.detach(), *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_labelled_token_gives_zero():
    hidden = torch.randn(4, 8, requires_grad=True)
    head = torch.nn.Linear(8, 11)
    loss = chunked_cross_entropy(hidden, torch.full((4,), -100), head, list(head.parameters()), 2)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_shift_is_the_convention_of_transformers():
    assert shift(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"gemma3"}))
def test_a_models_own_loss_and_gradients(family):
    """Through the hooks, the model makes no logits, and loss and gradients are those of its own forward."""
    model = tiny_model(family).train()
    twin = copy.deepcopy(model)
    ids = torch.randint(3, 60, (2, 21))
    labels = ids.clone()
    labels[0, :9] = -100
    with chunked_loss(model, 5):
        output = model(input_ids=ids, labels=labels, use_cache=False)
    expected = twin(input_ids=ids, labels=labels, use_cache=False)
    output.loss.backward()
    expected.loss.backward()
    assert output.logits.shape[1] == 0
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert model.eval()(input_ids=ids).logits.shape[1] == 21  # hooks are gone, and evaluation never saw them


def test_num_items_divides_the_sum():
    model = tiny_model("llama").train()
    ids = torch.randint(3, 60, (2, 21))
    with chunked_loss(model, 8):
        mean = model(input_ids=ids, labels=ids, use_cache=False).loss
        share = model(input_ids=ids, shift_labels=shift(ids), num_items_in_batch=torch.tensor(80), use_cache=False).loss
    torch.testing.assert_close(share * 80, mean * 40)
