"""Milliseconds of what layers are made of, forward and backward: attention by kernel; norm, MLP and RoPE by way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu_parts.base import Measurement, Setting
from gpu_parts.parity import attend, kernel_names
from gpu_parts.training import _liger

_HEADS, _WIDTH, _TOKENS = 32, 128, 32_768
# case -> (variant, tokens, key-value heads); S2-Attn in groups of 8,192
ATTENTION = {
    "full 8192": ("full", 8192, 32),
    "s2 32768": ("s2", 32_768, 32),
    "s2 98304": ("s2", 98_304, 32),
    "full 32768": ("full", 32_768, 32),
    "full 32768 gqa": ("full", 32_768, 8),
    "full 98304": ("full", 98_304, 32),
}
_GROUP = 8192


def attention(setting: Setting, kernel: str, case: str) -> dict[str, Any]:
    """Return milliseconds of one layer's attention, forward and backward, and TFLOP/s of what is visible."""
    from longext.attention.layout import Layout

    variant, length, kv_heads = ATTENTION[case]
    length, group = setting.tokens(length), setting.tokens(_GROUP)
    sizes = [(1, heads, length, _WIDTH) for heads in (_HEADS, kv_heads, kv_heads)]
    inputs = [torch.randn(size, device=setting.device, dtype=setting.dtype, requires_grad=True) for size in sizes]
    gradient = torch.randn(1, length, _HEADS, _WIDTH, device=setting.device, dtype=setting.dtype)
    layout = Layout(1, length)

    def step() -> None:
        torch.autograd.grad(attend(kernel, variant, layout, group, None, *inputs), inputs, gradient)

    seconds = setting.time(step)
    # query-key pairs that are visible; in S2-Attn half of the heads have two pieces of half a group at the ends
    pairs = length * length / 2 if variant == "full" else (length - group / 4) * group / 2
    flops = 3.5 * 4 * pairs * _HEADS * _WIDTH  # backward: 2.5 times forward
    return {"milliseconds": seconds * 1e3, "tflops": flops / seconds / 1e12}


def layer(setting: Setting, what: str, way: str) -> dict[str, Any]:
    """Return milliseconds and peak GiB of one norm, MLP or rotation over 32,768 tokens, forward and backward."""
    from transformers import LlamaConfig

    config = LlamaConfig(**setting.shape("llama2-7b"))
    length = setting.tokens(_TOKENS)
    run, shape, parameters = _BUILDERS[what](setting, config, way)
    if way == "compile":
        torch._dynamo.reset()
        run = torch.compile(run)
    inputs = torch.randn(shape(length), device=setting.device, dtype=setting.dtype, requires_grad=True)
    with torch.no_grad():
        gradient = torch.randn_like(run(inputs))

    def step() -> None:
        torch.autograd.grad(run(inputs), [inputs, *parameters], gradient)

    setting.reset_peaks()
    return {"milliseconds": setting.time(step) * 1e3, **setting.peaks()}


Built = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[int], tuple[int, ...]], list[torch.Tensor]]


def _norm(setting: Setting, config: Any, way: str) -> Built:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    kind = _liger("transformers").LigerRMSNorm if way == "liger" else LlamaRMSNorm
    norm = kind(config.hidden_size, config.rms_norm_eps).to(setting.device)  # a trained norm: float32
    return norm, lambda n: (1, n, config.hidden_size), list(norm.parameters())


def _mlp(setting: Setting, config: Any, way: str) -> Built:
    from transformers.models.llama.modeling_llama import LlamaMLP

    kind = _liger("transformers").LigerSwiGLUMLP if way == "liger" else LlamaMLP
    mlp = kind(config).to(setting.device, setting.dtype).requires_grad_(False)
    return mlp, lambda n: (1, n, config.hidden_size), []


def _rope(setting: Setting, config: Any, way: str) -> Built:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rotate = _liger("transformers").liger_rotary_pos_emb if way == "liger" else apply_rotary_pos_emb
    width = config.hidden_size // config.num_attention_heads
    length = setting.tokens(_TOKENS)
    with setting.device:
        dtype = torch.zeros(1, dtype=setting.dtype)
        cos, sin = LlamaRotaryEmbedding(config)(dtype, torch.arange(length)[None])

    def run(x: torch.Tensor) -> torch.Tensor:
        # liger works in place on what it is given
        query, key = x.clone().chunk(2, 1)
        return torch.cat(rotate(query, key, cos, sin), 1)

    return run, lambda n: (1, 2 * config.num_attention_heads, n, width), []


_BUILDERS = {"norm": _norm, "mlp": _mlp, "rope": _rope}


def kernels(setting: Setting) -> list[Measurement]:
    """Return attention by case and kernel, then the other pieces of a layer by way."""
    seconds = {"s2 98304": 1.0, "full 32768": 1.0, "full 98304": 4.0}
    own = [
        Measurement(f"kernels/attention/{case}/{name}", seconds.get(case, 0.5), partial(attention, setting, name, case))
        for case in ATTENTION
        for name in kernel_names()
        if name != "eager"
    ]
    return own + [
        Measurement(f"kernels/{what}/{way}", 5.0 if way == "compile" else 0.5, partial(layer, setting, what, way))
        for what in _BUILDERS
        for way in ("eager", "liger", "compile")
    ]
