"""Every attention variant and backend against its definition in float64, forward and backward."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types

import pytest
import torch
from attention_reference import DEFINITIONS, LAYOUTS, reference
from contributing import added_file

from longext.attention.chunks import Chunk, KeyValueStore
from longext.attention.layout import Layout, make_layout
from longext.attention.shifted import AttentionPlan, train_attention
from longext.attention.variant import ATTENTION_VARIANTS
from longext.errors import ConfigError, MissingExtraError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
D = 8
ANY_LENGTH = [name for name in ATTENTION_VARIANTS if name != "s2-wrapped"]

# name, attention_mask or None, document ids or None, segment ids of the reference
BATCHES = {
    "whole": (None, None, [[0] * 32] * 2),
    "odd length": (None, None, [[0] * 29]),
    "shorter than a group": (None, None, [[0] * 7]),
    "right padding": ([[1] * 27 + [0] * 5, [1] * 32], None, [[0] * 27 + [-1] * 5, [0] * 32]),
    "left padding": ([[0] * 9 + [1] * 23, [1] * 32], None, [[-1] * 9 + [0] * 23, [0] * 32]),
    "one row all padding": ([[0] * 16, [1] * 16], None, [[-1] * 16, [0] * 16]),
    "documents": (
        None,
        [[0] * 11 + [1] * 19 + [-1] * 2, [0] * 3 + [1] + [2] * 28],
        [[0] * 11 + [1] * 19 + [-1] * 2, [0] * 3 + [1] + [2] * 28],
    ),
    "many documents": (None, [[i // 3 for i in range(40)]], [[i // 3 for i in range(40)]]),
}


def make_batch(name, heads, kv_heads, dtype):
    attention_mask, documents, rows = BATCHES[name]
    shape = (len(rows), heads, len(rows[0]), D)
    q = torch.randn(shape, dtype=dtype)
    k, v = (torch.randn(shape[0], kv_heads, shape[2], D, dtype=dtype) for _ in range(2))
    layout = make_layout(
        shape[0],
        shape[2],
        None if attention_mask is None else torch.tensor(attention_mask),
        None if documents is None else torch.tensor(documents),
        separate_documents=True,
    )
    return q, k, v, layout, rows


def compare(variant, backend, layout, rows, q, k, v, group_size=8, **options):
    """Forward and backward of a backend against the definition; tolerance relative to the largest gradient."""
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = [x.double().clone().requires_grad_() for x in (q, k, v)]
    kinds = DEFINITIONS[variant]
    plan = AttentionPlan(layout, group_size, backend)
    window = options.pop("window", None)
    out = train_attention(
        ATTENTION_VARIANTS[variant], plan, *ours, scale=0.3, sliding_window=window, softcap=options.get("softcap")
    )
    expected = reference(
        *theirs, rows, ("dense", "dense") if window else kinds, group_size, 0.3, window=window, **options
    )
    weight = torch.randn_like(expected)
    (out.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    tolerance = TOLERANCE[q.dtype]
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a.grad.double(), b.grad, rtol=tolerance, atol=tolerance * max(1, float(b.grad.abs().max()))
        )


def test_every_variant_has_a_definition_to_be_compared_with():
    assert set(DEFINITIONS) == set(ATTENTION_VARIANTS), "add its masks to tests/attention_reference.py"


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_head_layouts(variant, heads, kv_heads, backend):
    q, k, v, layout, rows = make_batch("whole", heads, kv_heads, torch.float32)
    compare(variant, backend, layout, rows, q, k, v)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("variant", ANY_LENGTH)
def test_batches(variant, name, backend):
    q, k, v, layout, rows = make_batch(name, 4, 2, torch.float32)
    compare(variant, backend, layout, rows, q, k, v)


@pytest.mark.parametrize("group_size", [2, 3, 5, 7, 8, 16, 31, 32, 33])
def test_group_sizes_in_float64(group_size):
    q, k, v, layout, rows = make_batch("left padding", 5, 1, torch.float64)
    compare("s2", "sdpa", layout, rows, q, k, v, group_size)


def test_wrapped_variant_by_rolling_tensors():
    """LongLoRA's own steps: roll the upper heads by half a group, attend in groups, roll back."""
    group, (q, k, v) = 8, (torch.randn(2, 4, 32, D) for _ in range(3))
    upper = [torch.cat([x[:, :2], x[:, 2:].roll(-group // 2, 2)], 1) for x in (q, k, v)]
    pieces = [x.transpose(1, 2).reshape(2 * 4, group, 4, D).transpose(1, 2) for x in upper]
    out = torch.nn.functional.scaled_dot_product_attention(*pieces, is_causal=True, scale=0.3)
    out = out.transpose(1, 2).reshape(2, 32, 4, D)
    expected = torch.cat([out[:, :, :2], out[:, :, 2:].roll(group // 2, 1)], 2)
    ours = train_attention(ATTENTION_VARIANTS["s2-wrapped"], AttentionPlan(Layout(2, 32), group), q, k, v, 0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_wrapped_variant_refuses_lengths_it_cannot_roll():
    q, k, v = (torch.randn(1, 4, 30, D) for _ in range(3))
    with pytest.raises(ConfigError, match="30 tokens, groups of 8"):
        train_attention(ATTENTION_VARIANTS["s2-wrapped"], AttentionPlan(Layout(1, 30), 8), q, k, v, 0.3)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 3, 8, 20, 31, 64])
@pytest.mark.parametrize("name", ["whole", "left padding", "documents"])
def test_sliding_window_layers_keep_their_window(name, window, backend):
    q, k, v, layout, rows = make_batch(name, 4, 2, torch.float32)
    compare("s2", backend, layout, rows, q, k, v, window=window)


def test_soft_capped_scores():
    q, k, v, layout, rows = make_batch("documents", 4, 2, torch.float32)
    compare("s2", "auto", layout, rows, q, k, v, softcap=5.0)
    with pytest.raises(ConfigError, match="cannot cap attention scores"):
        compare("s2", "sdpa", layout, rows, q, k, v, softcap=5.0)


@pytest.mark.parametrize("variant", ANY_LENGTH)
@pytest.mark.parametrize("name", BATCHES)
def test_flash_backend_calls_its_kernel_rightly(variant, name, monkeypatch):
    """flash-attn is not installed here: a stand-in with its signature and meaning shows that boundaries are right."""

    def varlen(q, k, v, ends, ends_k, longest, longest_k, dropout_p, softmax_scale, causal, window_size):
        assert torch.equal(ends, ends_k)
        assert ends.dtype == torch.int32
        assert longest == longest_k == int(ends.diff().max())
        assert causal
        out = torch.zeros_like(q)
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            rows = [[0] * (end - start)]
            window = window_size[0] + 1 if window_size[0] >= 0 else None
            part = reference(*one, rows, ("dense", "dense"), 0, softmax_scale, window=window)
            out = out.index_put((torch.arange(start, end),), part[0].to(q.dtype))
        return out

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr("longext.attention.backends._has_flash", lambda: True)
    q, k, v, layout, rows = make_batch(name, 4, 2, torch.float32)
    compare(variant, "flash", layout, rows, q, k, v)
    q, k, v, layout, rows = make_batch(name, 4, 2, torch.float32)
    compare(variant, "flash", layout, rows, q, k, v, window=5)


def varlen_by_definition(q, k, v, ends, ends_k, window, scale):
    """Causal attention of each run of queries, aligned to the last of its keys; [T, H, D], k and v with K heads."""
    parts = []
    for at in range(len(ends) - 1):
        mine, keys = slice(ends[at], ends[at + 1]), slice(ends_k[at], ends_k[at + 1])
        one = [x.transpose(0, 1) for x in (q[mine], k[keys], v[keys])]
        one[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in one[1:]]
        lengths = one[0].shape[1], one[1].shape[1]
        distance = torch.arange(lengths[0])[:, None] + lengths[1] - lengths[0] - torch.arange(lengths[1])
        mask = (distance >= 0) & (distance <= (window if window >= 0 else lengths[1]))
        out = torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("groups_heads", [False, True])
def test_torchs_variable_length_kernel_is_called_rightly(groups_heads, monkeypatch):
    """It runs on CUDA alone: a stand-in with torch 2.11's signature, or with 2.13's; whole rows, and rows in chunks."""

    def varlen(q, k, v, ends, ends_k, longest, longest_k, *, scale=None, window_size=(-1, -1)):
        assert k.shape[1] == q.shape[1]
        assert (longest, longest_k) == (int(ends.diff().max()), int(ends_k.diff().max()))
        assert window_size[1] == 0  # causal
        return varlen_by_definition(q, k, v, ends.tolist(), ends_k.tolist(), window_size[0], scale)

    def grouping(q, k, v, *ends, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (k.shape[1] != q.shape[1])
        return varlen_by_definition(q, k, v, ends[0].tolist(), ends[1].tolist(), window_size[0], scale)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", grouping if groups_heads else varlen)
    monkeypatch.setattr("longext.attention.backends._has_varlen", lambda: True)
    for variant, name, options in (("s2", "documents", {}), ("full", "documents", {"window": 5}), ("s2", "whole", {})):
        q, k, v, layout, rows = make_batch(name, 4, 2, torch.float64)
        compare(variant, "flash", layout, rows, q, k, v, **options)
        plan, whole = AttentionPlan(layout, 8, "flash"), (q.detach(), k.detach(), v.detach())
        expected = train_attention(ATTENTION_VARIANTS[variant], plan, *whole, 0.3, sliding_window=options.get("window"))
        store, found = KeyValueStore(), []
        for number, start in enumerate(range(0, q.shape[2], 12)):
            stop = min(start + 12, q.shape[2])
            chunk = dataclasses.replace(plan, chunk=Chunk(number, start, stop, store))
            part = [x[:, :, start:stop] for x in whole]
            window = options.get("window")
            found.append(train_attention(ATTENTION_VARIANTS[variant], chunk, *part, 0.3, sliding_window=window))
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-10, atol=1e-10)


def test_flash_backend_without_flash_attn_says_how_to_get_it(monkeypatch):
    q, k, v, layout, rows = make_batch("whole", 4, 2, torch.float32)
    monkeypatch.setattr("longext.attention.backends._has_flash", lambda: False)
    with pytest.raises(MissingExtraError, match="flash-attn"):
        compare("s2", "flash", layout, rows, q, k, v)


TOY = added_file("longext/attention/variants/quarter.py")


@pytest.fixture
def quarter(tmp_path, monkeypatch):
    """A variant in a file of its own, as one in attention/variants/ is."""
    (tmp_path / "quarter.py").write_text(TOY)
    package = importlib.import_module("longext.attention.variants")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setitem(DEFINITIONS, "quarter", ("shifted", "shifted"))
    yield "quarter"
    ATTENTION_VARIANTS.unregister("quarter")
    sys.modules.pop("longext.attention.variants.quarter")


def test_a_variant_is_one_file(quarter):
    assert quarter in ATTENTION_VARIANTS
    assert ATTENTION_VARIANTS.summary(quarter) == "Groups of half the size"
    for name in BATCHES:
        q, k, v, layout, rows = make_batch(name, 4, 2, torch.float32)
        compare(quarter, "sdpa", layout, rows, q, k, v)
