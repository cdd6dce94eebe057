"""Causal attention of queries behind earlier keys, merged from two mask-free calls of one fused kernel.

Every query sees all earlier keys, and those of the queries up to its own: a call without causality and a square causal
one. With L_i the log-sum-exp of call i, and L that of both, the output is sum_i exp(L_i - L) out_i. A kernel's backward
pass takes weights from exp(score - L), so that given the merged output and L each call's gradients are those of the
whole. torch's kernels return and take L through their operators, which torch's own ring attention uses alike.

Shape legend: B rows, H query heads, K key-value heads, N queries, M >= N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class FusedKernel:
    """A kernel by its two operators.

    Attributes:
        forward: (q, k, v, is_causal, scale) -> (output [B, H, N, D], log-sum-exp, what backward wants besides).
        backward: (gradient, q, k, v, output, log-sum-exp, rest, is_causal, scale) -> gradients of q, k and v.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def fused_kernel(query: Tensor) -> FusedKernel | None:
    """Return the kernel to merge with, None where torch's flash kernel does it in one call (GPUs before Hopper)."""
    if query.device.type == "cpu":
        return _CPU
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _CUDNN if torch.cuda.get_device_capability(query.device)[0] >= 9 else None
    return None


def merged_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: FusedKernel) -> Tensor:
    """Return [B, H, N, D] of q [B, H, N, D] behind the first M - N of k, v [B, K, M, D]."""
    out: Tensor = _Merged.apply(q, k, v, scale, kernel)
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: FusedKernel) -> Tensor:
        """Call the kernel twice and merge."""
        outputs, sums, rests = [], [], []
        for keys, values, is_causal in _both(q, k, v):
            out, log_sum, rest = kernel.forward(q, keys, values, is_causal, scale)
            outputs.append(out)
            sums.append(log_sum)
            rests.append(rest)
        total = torch.logaddexp(*sums)
        shares = [(log_sum - total).exp().reshape(*q.shape[:3], 1) for log_sum in sums]
        merged = (outputs[0] * shares[0] + outputs[1] * shares[1]).to(q.dtype)
        ctx.save_for_backward(q, k, v, merged, total)
        ctx.rests, ctx.scale, ctx.kernel = rests, scale, kernel
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Take both calls' gradients under the merged output and log-sum-exp."""
        q, k, v, out, total = ctx.saved_tensors
        found = [
            ctx.kernel.backward(gradients[0], q, keys, values, out, total, rest, is_causal, ctx.scale)
            for (keys, values, is_causal), rest in zip(_both(q, k, v), ctx.rests, strict=True)
        ]
        (d_query, *earlier), (d_query_own, *own) = found
        d_key, d_value = (torch.cat(pair, 2) for pair in zip(earlier, own, strict=True))
        return d_query + d_query_own, d_key, d_value, None, None


def _both(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, bool], tuple[Tensor, Tensor, bool]]:
    earlier = k.shape[2] - q.shape[2]
    return (k[:, :, :earlier], v[:, :, :earlier], False), (k[:, :, earlier:], v[:, :, earlier:], True)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor, Any]:
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return out, log_sum, None


def _cpu_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, _: Any, is_causal: bool, scale: float
) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, q, k, v, out, total, 0.0, is_causal, scale=scale
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor, Any]:
    out, log_sum, *rest, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )
    return out, log_sum, rest


def _cudnn_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    rest: Any,
    is_causal: bool,
    scale: float,
) -> Any:
    cum_q, cum_k, max_q, max_k, seed, offset = rest
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        gradient, q, k, v, out, total, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, is_causal, scale=scale
    )


_CPU = FusedKernel(_cpu_forward, _cpu_backward)
_CUDNN = FusedKernel(_cudnn_forward, _cudnn_backward)
