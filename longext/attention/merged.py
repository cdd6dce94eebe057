"""Attention out of mask-free calls of fused kernels, merged by log-sum-exp.

What queries see is cut into pieces (`pieces.py`) that a kernel computes without a mask. With L_c the log-sum-exp of
call c, and L that of all, the output is sum_c exp(L_c - L) out_c. A kernel's backward pass takes weights from
exp(score - L), so that given the merged output and L each call's gradients are those of the whole. torch's kernels
return and take L through their operators, which torch's own ring attention uses alike.

Shape legend: B rows, H query heads, K key-value heads, N queries, M keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from longext.attention.pieces import Piece

Tensor = torch.Tensor


@dataclass(frozen=True)
class FusedKernel:
    """A kernel by its two operators.

    Attributes:
        forward: (q, k, v, is_causal, scale) -> (output [B, H, N, D], log-sum-exp [B, H, N], what backward wants
            besides). Causal calls are square.
        backward: (gradient, q, k, v, output, log-sum-exp, rest, is_causal, scale) -> gradients of q, k and v.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def fused_kernel(query: Tensor) -> FusedKernel | None:
    """Return the kernel to merge with, None where torch's flash kernel is causal behind earlier keys by itself."""
    if query.device.type == "cpu":
        return _CPU
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _CUDNN if torch.cuda.get_device_capability(query.device)[0] >= 9 else None
    return None


def any_kernel(query: Tensor) -> FusedKernel:
    """Return a kernel that runs on the query's device and dtype: fused, or the definition in blocks of queries."""
    flash = _FLASH if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _PLAIN
    return fused_kernel(query) or flash


def merged_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: FusedKernel) -> Tensor:
    """Return [B, H, N, D] of q [B, H, N, D] behind the first M - N of k, v [B, K, M, D]."""
    number, earlier = q.shape[2], k.shape[2] - q.shape[2]
    pieces = [Piece("all", 0, number, 0, earlier), Piece("until", 0, number, earlier, number)]
    return attend_pieces([Part(q, k, 0, 0, pieces)], v, number, scale, kernel)


@dataclass(frozen=True)
class Part:
    """Pieces that share their queries and keys.

    Attributes:
        query, key: [B, H, *, D] and [B, K, *, D], of the tokens from `query_start` and `key_start` on.
        pieces: in numbers of all queries and keys.
    """

    query: Tensor
    key: Tensor
    query_start: int
    key_start: int
    pieces: Sequence[Piece]


def attend_pieces(parts: Sequence[Part], v: Tensor, count: int, scale: float, kernel: FusedKernel) -> Tensor:
    """Return [B, H, count, D]: softmax over all that a query sees in any of `parts`; zeros if it sees nothing."""
    tensors = [tensor for part in parts for tensor in (part.query, part.key)]
    out: Tensor = _Merged.apply(parts, count, scale, kernel, v, *tensors)
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Part], count: int, scale: float, kernel: FusedKernel, v: Tensor, *tensors: Tensor
    ) -> Tensor:
        """Call the kernel for each piece and merge."""
        first = tensors[0]
        wide = first.dtype if first.dtype == torch.float64 else torch.float32
        out = first.new_zeros((first.shape[0], first.shape[1], count, v.shape[3]), dtype=wide)
        total = out.new_full(out.shape[:3], -float("inf"))
        rests = []
        for number, part in enumerate(parts):
            query, key = tensors[2 * number : 2 * number + 2]
            for piece in part.pieces:
                q, k, values = _inputs(piece, part, query, key, v)
                own, log_sum, rest = kernel.forward(q, k, values, piece.kind != "all", scale)
                _merge(piece, out, total, own, log_sum.reshape(own.shape[:3]).to(wide))
                rests.append(rest)
        merged = out.to(first.dtype)
        ctx.save_for_backward(v, merged, total, *tensors)
        nothing = first.new_empty(0)  # the parts' own tensors would outlive those that are saved
        ctx.parts = [replace(part, query=nothing, key=nothing) for part in parts]
        ctx.rests, ctx.scale, ctx.kernel = rests, scale, kernel
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Take every piece's gradients under the merged output and log-sum-exp."""
        v, out, total, *tensors = ctx.saved_tensors
        d_value, found, rests = torch.zeros_like(v), [torch.zeros_like(x) for x in tensors], iter(ctx.rests)
        for number, part in enumerate(ctx.parts):
            query, key = tensors[2 * number : 2 * number + 2]
            d_query, d_key = found[2 * number : 2 * number + 2]
            for piece in part.pieces:
                at = (piece.query_start, piece.query_step, piece.queries)
                taken = (_take(x, piece, *at) for x in (gradients[0], out, total[..., None]))
                gradient, own, log_sum = taken
                own_gradients = ctx.kernel.backward(
                    gradient, *_inputs(piece, part, query, key, v), own, log_sum[..., 0].contiguous(), next(rests),
                    piece.kind != "all", ctx.scale,
                )  # fmt: skip
                places = _places(piece, part)
                for whole, share, place in zip((d_query, d_key, d_value), own_gradients, places, strict=True):
                    _blocks(whole, piece.count, *place).add_(_given(share, piece, place[2], whole.shape[0]))
        return None, None, None, None, d_value, *found


def _places(piece: Piece, part: Part) -> tuple[tuple[int, int, int], ...]:
    """Return (first, step, length) of the piece's blocks in the part's queries and keys, and in all values."""
    return (
        (piece.query_start - part.query_start, piece.query_step, piece.queries),
        (piece.key_start - part.key_start, piece.key_step, piece.keys),
        (piece.key_start, piece.key_step, piece.keys),
    )


def _inputs(piece: Piece, part: Part, query: Tensor, key: Tensor, v: Tensor) -> list[Tensor]:
    return [_take(x, piece, *place) for x, place in zip((query, key, v), _places(piece, part), strict=True)]


def _blocks(x: Tensor, count: int, first: int, step: int, length: int) -> Tensor:
    """Return a view [B, H, count, length, D] of x [B, H, *, D]."""
    if count == 1:
        return x[:, :, None, first : first + length]
    rows, heads, tokens, width = x.stride()
    sizes = (*x.shape[:2], count, length, x.shape[3])
    # not unfold: what is written into its blocks under torch.compile zeroes the tokens between them
    return x.as_strided(sizes, (rows, heads, step * tokens, tokens, width), x.storage_offset() + first * tokens)


def _take(x: Tensor, piece: Piece, first: int, step: int, length: int) -> Tensor:
    """Return the blocks of x [B, H, *, D] as rows [B * count, H, length, D]; reversed if queries see keys "from" on.

    Reversing both sides makes of keys from a query's place on those up to it.
    """
    taken = _blocks(x, piece.count, first, step, length)
    taken = taken.transpose(1, 2).reshape(-1, x.shape[1], length, x.shape[3])
    return taken.flip(2) if piece.kind == "from" else taken


def _given(share: Tensor, piece: Piece, length: int, rows: int) -> Tensor:
    """Undo `_take`: [B * count, H, length, D] -> [B, H, count, length, D]."""
    share = share.flip(2) if piece.kind == "from" else share
    return share.reshape(rows, piece.count, share.shape[1], length, -1).transpose(1, 2)


def _merge(piece: Piece, out: Tensor, total: Tensor, own: Tensor, log_sum: Tensor) -> None:
    """Merge a piece's output [B * count, H, n, D] and log-sum-exp [B * count, H, n] into those of all queries."""
    place = (piece.query_start, piece.query_step, piece.queries)
    into, sums = _blocks(out, piece.count, *place), _blocks(total[..., None], piece.count, *place)
    own, log_sum = (_given(x, piece, piece.queries, out.shape[0]) for x in (own, log_sum[..., None]))
    joint = torch.logaddexp(sums, log_sum)
    into.mul_((sums - joint).exp()).addcmul_(own.to(out.dtype), (log_sum - joint).exp())
    sums.copy_(joint)


# --- kernels ----------------------------------------------------------------------------------------------------------


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


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor, Any]:
    out, log_sum, *rest, _ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, is_causal, False, scale=scale
    )
    return out, log_sum, rest


def _flash_backward(
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
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        gradient, q, k, v, out, total, cum_q, cum_k, max_q, max_k, 0.0, is_causal, seed, offset, scale=scale
    )


_QUERIES = 1024  # of the plain kernel's blocks: scores of that many queries exist at a time


def _scores(q: Tensor, k: Tensor, at: int, is_causal: bool, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) * scale) @ k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    if is_causal:
        place = torch.arange(k.shape[2], device=q.device)
        scores.masked_fill_(place > place[at : at + q.shape[2], None], -float("inf"))
    return scores


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor, Any]:
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    outputs, sums = [], []
    for number, block in enumerate(q.split(_QUERIES, 2)):
        scores = _scores(block, k, number * _QUERIES, is_causal, scale)
        sums.append(scores.logsumexp(-1))
        outputs.append((scores - sums[-1][..., None]).exp().to(v.dtype) @ values)
    return torch.cat(outputs, 2), torch.cat(sums, 2), None


def _plain_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, _: Any, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide, repeats = total.dtype, q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(repeats, 1) for x in (k, v))
    d_query, d_key, d_value = [], torch.zeros_like(keys), torch.zeros_like(values)
    for number, block in enumerate(q.split(_QUERIES, 2)):
        here = slice(number * _QUERIES, number * _QUERIES + block.shape[2])
        weights = (_scores(block, k, here.start, is_causal, scale) - total[:, :, here, None]).exp()
        own = gradient[:, :, here].to(wide)
        d_value += weights.transpose(-1, -2) @ own
        inner = (own * out[:, :, here]).sum(-1, keepdim=True)
        d_scores = weights * (own @ values.transpose(-1, -2) - inner) * scale
        d_query.append(d_scores @ keys)
        d_key += d_scores.transpose(-1, -2) @ block.to(wide)
    d_key, d_value = (x.unflatten(1, (-1, repeats)).sum(2).to(k.dtype) for x in (d_key, d_value))
    return torch.cat(d_query, 2).to(q.dtype), d_key, d_value


_CPU = FusedKernel(_cpu_forward, _cpu_backward)
_CUDNN = FusedKernel(_cudnn_forward, _cudnn_backward)
_FLASH = FusedKernel(_flash_forward, _flash_backward)
_PLAIN = FusedKernel(_plain_forward, _plain_backward)
