"""Layers that keep one hidden state between them, and layer inputs in host memory, against no checkpointing."""

from __future__ import annotations

import gc

import pytest
import torch
from families import CONFIGS, tiny_model
from transformers import AutoModelForCausalLM

from longext.planning.tracker import MemoryTracker
from longext.training.layers.rematerialise import Rematerialisation
from longext.training.layers.transfer import CopyStream, NoStream, Transfer
from longext.training.loading import enable_checkpointing

NUM_LAYERS = 7


def model_of(dropout=0.0, layers=NUM_LAYERS, **sizes):
    config = CONFIGS["llama"]()
    config.update({"num_hidden_layers": layers, "attention_dropout": dropout, **sizes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().train()


def step(model, length=24, dtype=None):
    ids = torch.arange(2 * length).view(2, length) % 60
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def hold(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


def use(model, transfer, nested):
    model._set_gradient_checkpointing(True, Rematerialisation(transfer, nested), 1)


@pytest.mark.parametrize("with_transfer", [False, True])
@pytest.mark.parametrize("nested", [1, 2, 3, 7, 8])
def test_nested_layers_with_dropout(nested, with_transfer):
    """Float64, seven layers, dropout in attention: 1e-12 of no checkpointing, twice in a row."""
    expected = step(model_of(0.3))
    model = model_of(0.3)
    use(model, Transfer() if with_transfer else None, nested)
    for _ in range(2):
        hold(step(model), expected)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text", "falcon", "mixtral", "phi3"])
def test_families(family):
    """Float32, groups of two layers: bit for bit what transformers' own checkpointing gives."""
    results = []
    for nested in (1, 2):
        model = tiny_model(family).train()
        enable_checkpointing(model, offload=False, nested=nested)
        results.append(step(model))
    hold(*results, tolerance=0.0)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_layer(every):
    expected = step(model_of())
    model = model_of()
    enable_checkpointing(model, offload=False, every=every)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [n % every == 0 for n in range(NUM_LAYERS)]
    hold(step(model), expected)


def test_bfloat16_under_autocast():
    """Forward and backward in one autocast region, whose cache they share: no weight loses its gradient; bit-equal."""
    results = []
    for nested in (1, 3):
        model = model_of().float()
        enable_checkpointing(model, offload=False, nested=nested)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model))
    hold(*results, tolerance=0.0)


def test_a_layer_whose_input_is_not_the_output_before_begins_a_group():
    """A hook that hands on another tensor: rebuilding would miss it."""
    expected, found = [], []
    for nested, results in ((None, expected), (4, found)):
        model = model_of()
        if nested:
            use(model, None, nested)
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, __, output: output * 1.5)
        results.append(step(model))
    hold(found[0], expected[0])


def test_without_gradients_a_layer_just_runs():
    model = model_of()
    transfer = Transfer()
    use(model, transfer, 3)
    with torch.no_grad():
        model(torch.arange(9)[None])
    assert transfer.num_bytes == 0


def test_two_graphs_at_once():
    """Two forward passes, then their backward passes in the order of the first."""
    ids = torch.arange(20)[None]
    expected = model_of()
    model = model_of()
    use(model, Transfer(), 3)
    for each in (expected, model):
        losses = [each(input_ids=x, labels=x).loss for x in (ids, ids + 20)]
        for loss in losses:
            loss.backward()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-18)


def test_hidden_states_that_live():
    """Layers of one width and a tiny MLP: nested keeps 16 / 4 + 4 hidden states at the peak, not 16.

    What one layer needs while it is computed again is the same in both: the difference is counted, to half a state.
    """
    peaks, length = {}, 512
    for nested in (1, 4):
        model = model_of(layers=16, intermediate_size=32).float()
        model.set_attn_implementation("sdpa")
        use(model, None, nested)
        ids = torch.arange(length)[None] % 60
        model(ids, labels=ids, use_cache=False).loss.backward()
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        with MemoryTracker(known) as tracker:
            hidden = model.model(ids, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        peaks[nested] = tracker.peak
    state = 4 * length * 32
    assert (peaks[1] - peaks[4]) / state == pytest.approx(16 - (4 + 3), abs=0.6)


class Order(NoStream):
    """Notes what the device would be told."""

    def __init__(self):
        self.notes = []
        self.copies = 0

    def after_compute(self):
        self.notes.append("copy after compute")
        return super().after_compute()

    def mark(self):
        self.copies += 1
        return self.copies

    def hold_compute(self, event):
        self.notes.append(f"compute after copy {event}")


def test_what_waits_for_what():
    """The last tensor never leaves; the others come back one ahead of their use; each copy is waited for once."""
    transfer = Transfer()
    transfer._stream = order = Order()
    tensors = [torch.randn(5, 3) + i for i in range(3)]
    stored = [transfer.store(tensor) for tensor in tensors]
    copy = "copy after compute"
    # the device memory of a tensor is let go when the next one is stored, behind its copy
    assert order.notes == [copy, "compute after copy 1", copy, "compute after copy 2", copy]
    assert [each.on_device is None for each in stored] == [True, True, False]
    order.notes.clear()
    assert torch.equal(transfer.load(stored[2]), tensors[2])
    assert order.notes == ["compute after copy 3", copy]  # the second is on its way
    order.notes.clear()
    assert torch.equal(transfer.load(stored[1]), tensors[1])
    assert order.notes == ["compute after copy 4", copy]
    assert stored[1].fetched is None
    assert stored[0].fetched is not None
    assert torch.equal(transfer.load(stored[0]), tensors[0])


def test_blocks_are_used_again():
    transfer = Transfer()
    for _ in range(3):
        stored = [transfer.store(torch.randn(1000)) for _ in range(4)]
        for each in reversed(stored):
            transfer.load(each)
        del stored, each
        gc.collect()
        assert transfer.num_bytes == 4 * 4096
    transfer.store(torch.randn(17, dtype=torch.float64))
    assert transfer.num_bytes == 4 * 4096 + 256


def test_a_large_tensor_is_cut_into_blocks(monkeypatch):
    monkeypatch.setattr("longext.training.layers.transfer._LARGEST_BLOCK", 1024)
    transfer = Transfer()
    tensor = torch.randn(3, 700, dtype=torch.bfloat16)
    stored = transfer.store(tensor.mT)
    transfer.store(torch.zeros(1))
    assert transfer.num_bytes == 5 * 1024 + 4
    assert torch.equal(transfer.load(stored), tensor.mT)


def test_offload_goes_through_a_transfer():
    model = model_of()
    enable_checkpointing(model, offload=True, nested=2)
    function = model.model.layers[0]._gradient_checkpointing_func
    assert isinstance(function._transfer, Transfer)
    hold(step(model), step(model_of()))
    assert function._transfer.num_bytes > 0


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [1, 3])
def test_on_a_gpu(nested):
    """The sum of three steps' gradients is that of transformers' own checkpointing, and inputs leave the GPU.

    bfloat16; the norm of the difference is at most 1 % of a gradient's, for kernels that add in no fixed order. Of 12
    layer inputs at most four stay, and with groups those inside one.
    """
    length, sizes = 4096, {"hidden_size": 1024, "intermediate_size": 1024, "head_dim": 128}
    results, peaks = [], []
    for offload in (False, True):
        model = model_of(layers=12, **sizes).to("cuda", torch.bfloat16)
        enable_checkpointing(model, offload, nested=nested if offload else 1)
        ids = torch.arange(length, device="cuda")[None] % 60
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            hidden = model.model(ids, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        peaks.append(torch.cuda.max_memory_allocated())
        results.append([p.grad.float() for p in model.model.parameters()])
        del model, hidden
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 0.01 * expected.norm()
    kept = sum(x.numel() * x.element_size() for x in results[0])  # what the first model left behind
    state = 2 * length * 1024
    assert peaks[0] - (peaks[1] - kept) > (12 - 4 - (nested - 1)) * state
    assert isinstance(CopyStream(torch.device("cuda", 0)).after_compute(), torch.cuda.StreamContext)
