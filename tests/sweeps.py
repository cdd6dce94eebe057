"""Gradients of one batch, in one graph and swept in chunks."""

from __future__ import annotations

import torch

from longext.attention.layout import make_layout
from longext.attention.shifted import PLAN, AttentionPlan, register_attention
from longext.attention.variant import ATTENTION_VARIANTS
from longext.training.losses import LABEL_WEIGHTS, chunked_loss, shift
from longext.training.sweep import sweep_rows

GROUP = 8


def batch_of(kind: str, rows: int = 2, length: int = 44, vocabulary: int = 60, seed: int = 1) -> dict:
    """Tensors of a batch: "whole" rows, "packed" documents, "padded" ends, "masked" labels (some chunks have none)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    labels, documents = ids.clone(), torch.zeros_like(ids)
    if kind == "packed":
        begins = torch.zeros_like(ids)
        for row, starts in enumerate([[5, 6, 17, 33], [9, 31]]):
            begins[row, starts] = 1
        documents = begins.cumsum(1)
        labels[begins == 1] = -100
    if kind == "padded":
        for row, end in enumerate([37, 20]):
            documents[row, end:] = -1
            labels[row, end:] = -100
    if kind == "masked":
        labels[:, 10:31] = -100
    return {"input_ids": ids, "labels": labels, "document_ids": documents}


def gradients(
    model, batch, variant="s2", chunk=None, *, group=GROUP, network=None, positions=None, autocast=False, store=None,
    weights=None,
):  # fmt: skip
    """Return (loss, {name: gradient}); `network` is what is called (a PEFT model around `model`), if not `model`."""
    register_attention()
    network = model if network is None else network
    model.set_attn_implementation(ATTENTION_VARIANTS[variant].implementation)
    network.train()
    network.zero_grad()
    ids, documents = batch["input_ids"], batch["document_ids"]
    separate = bool((documents > 0).any())
    plan = AttentionPlan(make_layout(*ids.shape, None, documents, separate), group)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) if positions is None else positions
    tensors = {
        "input_ids": ids, "position_ids": positions, "labels": batch["labels"], "shift_labels": shift(batch["labels"]),
    }  # fmt: skip
    tensors |= {} if weights is None else {LABEL_WEIGHTS: weights}
    count = (tensors["shift_labels"] != -100).sum()

    def amp():
        return torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast)

    with chunked_loss(model, 16):
        if chunk is None:
            with amp():
                total = network(**tensors, num_items_in_batch=count, use_cache=False, **{PLAN: plan})["loss"]
            total.backward()
        else:
            total = sweep_rows(network, tensors, plan, chunk, count, store=store, autocast=amp)
    return total.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def worst(found: dict, expected: dict) -> float:
    """Return the largest difference of any gradient, relative to the largest element of it."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for name, value in expected.items()
        if value.abs().max() > 1e-12
    )
