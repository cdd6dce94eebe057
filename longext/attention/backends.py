"""Which kernel computes attention inside pieces, and why. All give the same numbers.

A backend maps q [B, H, N, D] and k, v [B, K, M, D] (K divides H) and the pieces of a layout to [B, N, H, D]; tokens in
no piece (padding) get zeros. M > N in a chunk of a row: the first keys are of tokens before the chunk. A kernel without
a mask is causal from the end: the last query sees all keys.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from longext.attention.layout import Boundaries, Bucket, Columns, Layout
from longext.attention.merged import fused_kernel, merged_attention
from longext.attention.variant import Cut
from longext.errors import ConfigError
from longext.extras import has, require
from longext.registry import Registry


@dataclass(frozen=True)
class Job:
    """One attention computation over some heads.

    Attributes:
        layout, cut, group_size: the pieces, as `Layout` cuts them.
        scale: multiplier of q k^T.
        dropout: probability on the attention weights.
        softcap: c of c * tanh(score / c) (Gemma 2), or None.
        window: tokens a query sees, itself included (sliding-window layers), or None. Only with `WHOLE`.
        columns: the chunk that queries and keys are of; None for whole rows.
    """

    layout: Layout
    cut: Cut
    group_size: int
    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    window: int | None = None
    columns: Columns | None = None

    @property
    def at(self) -> Columns:
        """The columns of queries and keys."""
        return self.columns or self.layout.whole


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Job, "torch.Tensor | None"], torch.Tensor]
Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Job], torch.Tensor]
BACKENDS: Registry[Backend] = Registry("backend")


def choose_backend(name: str, query: torch.Tensor, job: Job) -> str:
    """Return the backend to use for `name`.

    "auto" takes eager for soft caps; on CUDA in half precision flash-attn if it is installed, torch's variable-length
    kernel for packed rows; else SDPA.

    Raises:
        ConfigError: unknown name, or a backend that cannot do soft-capped scores or dropout.
        MissingExtraError: flash asked for, and neither flash-attn nor torch's variable-length kernel is there.
    """
    if name == "auto":
        if job.softcap is not None:
            return "eager"
        if not query.is_cuda or query.dtype == torch.float32:
            return "sdpa"
        ragged = job.layout.segments is not None or (job.window or job.layout.length) < job.layout.length
        return "flash" if _has_flash() or (ragged and _has_varlen() and not job.dropout) else "sdpa"
    BACKENDS[name]
    if job.softcap is not None and name != "eager":
        raise ConfigError(f"--backend {name} cannot cap attention scores, as this model does: use auto or eager.")
    if name == "flash" and not _has_flash():
        if not _has_varlen():
            require("--backend flash", ["flash"])
        if job.dropout:
            raise ConfigError(
                "--backend flash without flash-attn is torch's kernel, which knows no dropout on attention weights, as "
                "this model has: install flash-attn, or take --backend sdpa."
            )
    return name


@functools.cache
def _has_flash() -> bool:
    return has("flash_attn")


@functools.cache
def _has_varlen() -> bool:
    """True if torch has its variable-length kernel (2.10 and later), which runs on CUDA alone."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None and torch.cuda.is_available()


def _sdpa_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job, mask: torch.Tensor | None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention on [P, H, L, D]: causal pieces without a mask, so that fused kernels run."""
    is_behind = mask is None and k.shape[2] > q.shape[2]
    if is_behind and not job.dropout and (kernel := fused_kernel(q)):
        return merged_attention(q, k, v, job.scale, kernel)
    # mask-free kernels know grouped heads on a CPU and in half precision
    grouped = k.shape[1] != q.shape[1] and mask is None and (q.device.type == "cpu" or q.dtype != torch.float32)
    if not grouped:
        k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    is_causal = mask is None and not is_behind
    if is_behind:
        mask = causal_lower_right(q.shape[2], k.shape[2])  # no tensor on a GPU: flash takes it
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=job.scale, dropout_p=job.dropout, enable_gqa=grouped
    )


def _eager_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job, mask: torch.Tensor | None
) -> torch.Tensor:
    """The definition: softmax(q k^T * scale) v with the scores in memory, in float32 (float64 stays)."""
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.transpose(-1, -2)).to(wide) * job.scale  # softmax sums in half precision lose small weights
    if job.softcap is not None:
        scores = torch.tanh(scores / job.softcap) * job.softcap
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    weights = F.dropout(scores.masked_fill(~mask, float("-inf")).softmax(-1), job.dropout)
    return weights.to(v.dtype) @ v


def _repeat(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def _by_pieces(kernel: Kernel) -> Backend:
    """Make a backend of a kernel for [P, H, L, D] pieces."""

    def backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
        if job.window is not None and job.window < job.layout.length:
            return _sliding(kernel, q, k, v, job)
        if job.layout.segments is None and job.cut.reorder is None:
            return _whole_rows(kernel, q, k, v, job)
        return _gathered(kernel, q, k, v, job)

    return backend


def _whole_rows(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
    """Every row is one segment: its pieces are slices and reshapes, no token is copied by index."""
    columns, earlier = job.at, k.shape[2] - q.shape[2]
    cuts = _runs(job)
    if len(cuts) == 1 and not earlier:
        return _tile(kernel, q, k, v, cuts[0][1], job)
    # split, not slices: the gradient of a split is one concatenation, that of a slice a whole row of zeros
    queries = q.split([length for length, _ in cuts], 2)
    keys, values = (x.split([earlier + cuts[0][0], *(length for length, _ in cuts[1:])], 2) for x in (k, v))
    outputs = []
    for number, (_, size) in enumerate(cuts):
        if number == 0 and earlier:  # the rest of a piece that began in an earlier chunk
            outputs.append(kernel(queries[0], keys[0], values[0], job, None).transpose(1, 2))
        else:
            outputs.append(_tile(kernel, queries[number], keys[number], values[number], size, job))
    assert sum(length for length, _ in cuts) == columns.stop - columns.start
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _runs(job: Job) -> list[tuple[int, int]]:
    """Return the chunk as (tokens, tokens of each piece in them): a cut-off first piece, whole ones, the last one."""
    start, stop, group_size = job.at.start, job.at.stop, job.group_size
    if job.cut.first is None or job.layout.length <= group_size:
        return [(stop - start, stop - start)]
    first = job.cut.first(group_size) % group_size
    head = min((first - start) % group_size, stop - start)
    middle = (stop - start - head) // group_size * group_size
    tail = stop - start - head - middle
    return [run for run in ((head, head), (middle, group_size), (tail, tail)) if run[0]]


def _tile(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int, job: Job) -> torch.Tensor:
    """Attend inside pieces of `size` tokens that tile [B, H, n, D]; returns [B, n, H, D]."""
    rows, heads, length, width = q.shape
    count = length // size

    def pieces(x: torch.Tensor) -> torch.Tensor:
        if count == 1:
            return x
        return x.transpose(1, 2).reshape(rows * count, size, x.shape[1], width).transpose(1, 2)

    out = kernel(pieces(q), pieces(k), pieces(v), job, None)
    return out.transpose(1, 2).reshape(rows, length, heads, width)


def _gathered(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
    """General layouts: gather each bucket of spans, attend, scatter. Padding is at a span's end: causal hides it."""
    buckets = job.layout.buckets(job.cut, job.group_size, job.at, q.device)
    return _scattered(q, [(bucket, _attend(kernel, bucket, q, k, v, job, None)) for bucket in buckets])


def _sliding(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
    """Sliding-window layers: blocks of W queries against their own keys and the W before them, W the window.

    The first W tokens of a segment are plain causal attention; all others share one [W, 2 W] band. Time and memory
    grow with N * W, not with N^2.
    """
    window = job.window or q.shape[2]
    firsts, rest = job.layout.windows(window, job.at, q.device)
    outputs = [(bucket, _attend(kernel, bucket, q, k, v, job, None)) for bucket in firsts]
    if rest is not None:
        place = torch.arange(2 * window, device=q.device)
        distance = place[window:, None] - place  # rows: a block's queries; columns: the keys before it, then its own
        band = (distance >= 0) & (distance < window)
        outputs.append((rest, _attend(kernel, rest, q, k, v, job, band)))
    return _scattered(q, outputs)


def _attend(
    kernel: Kernel,
    bucket: Bucket,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    job: Job,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the outputs [P, H, L, D] of one bucket."""
    queries = _flat(q)[bucket.queries].transpose(1, 2)
    keys, values = (_flat(x)[bucket.keys].transpose(1, 2) for x in (k, v))
    return kernel(queries, keys, values, job, mask)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] -> [B N, H, D]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _scattered(q: torch.Tensor, outputs: list[tuple[Bucket, torch.Tensor]]) -> torch.Tensor:
    """Put the outputs [P, H, L, D] of buckets of spans back in place: [B, N, H, D], zeros for tokens of no piece."""
    rows, heads, length, width = q.shape
    indices, parts = [], []
    for bucket, out in outputs:
        part = out.transpose(1, 2)
        real = bucket.real
        indices.append(bucket.queries.reshape(-1) if real is None else bucket.queries[real])
        parts.append(part.reshape(-1, heads, width) if real is None else part[real])
    empty = q.new_zeros(rows * length, heads, width)
    if parts:
        empty = empty.index_put((torch.cat(indices),), torch.cat(parts).to(q.dtype))
    return empty.view(rows, length, heads, width)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
    """A variable-length kernel, flash-attn's or torch's: all spans of all rows in one call."""
    rows, heads, length, width = q.shape
    queries, keys = job.layout.boundaries(job.cut, job.group_size, job.at, job.window, q.device)
    q, k, v = (_flat(x) if at.index is None else _flat(x)[at.index] for x, at in ((q, queries), (k, keys), (v, keys)))
    out = (_flash_attn if _has_flash() else _varlen_attn)(q, k, v, queries, keys, job)
    if queries.index is not None:
        out = q.new_zeros(rows * length, heads, width).index_put((queries.index,), out)
    return out.view(rows, length, heads, width)


def _flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Boundaries, keys: Boundaries, job: Job
) -> torch.Tensor:
    """flash-attn on [T, H, D]; causal is aligned to the last query and key of a span."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    out: torch.Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        queries.ends,
        keys.ends,
        queries.longest,
        keys.longest,
        dropout_p=job.dropout,
        softmax_scale=job.scale,
        causal=True,
        window_size=(-1, -1) if job.window is None else (job.window - 1, 0),
    )
    return out


def _varlen_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Boundaries, keys: Boundaries, job: Job
) -> torch.Tensor:
    """torch's variable-length kernel on [T, H, D]; older ones want grouped heads repeated."""
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {}
    if k.shape[1] != q.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        more["enable_gqa"] = True
    else:
        k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    window = (-1 if job.window is None else job.window - 1, 0)  # to the left, to the right
    out = varlen_attn(
        q, k, v, queries.ends, keys.ends, queries.longest, keys.longest, scale=job.scale, window_size=window, **more
    )
    assert isinstance(out, torch.Tensor)  # the log-sum-exp was not asked for
    return out


BACKENDS.register("flash", _flash)
BACKENDS.register("sdpa", _by_pieces(_sdpa_kernel))
BACKENDS.register("eager", _by_pieces(_eager_kernel))
