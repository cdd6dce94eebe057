"""Which kernel computes attention inside pieces, and why. All give the same numbers.

A backend maps q [B, H, N, D] and k, v [B, K, N, D] (K divides H, or K = 1 head serves all) and the pieces of a layout
to [B, N, H, D]; tokens in no piece (padding) get zeros.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from longext.attention.layout import Bucket, Layout
from longext.attention.variant import Cut
from longext.errors import ConfigError, MissingExtraError
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
    """

    layout: Layout
    cut: Cut
    group_size: int
    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    window: int | None = None


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Job, "torch.Tensor | None"], torch.Tensor]
Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Job], torch.Tensor]
BACKENDS: Registry[Backend] = Registry("backend")


def choose_backend(name: str, query: torch.Tensor, softcap: float | None) -> str:
    """Return the backend to use for `name`; "auto" takes flash-attn if it can run, else SDPA, eager for soft caps.

    Raises:
        ConfigError: unknown name, or a backend that cannot do soft-capped scores.
        MissingExtraError: flash asked for and not installed.
    """
    if name == "auto":
        if softcap is not None:
            return "eager"
        return "flash" if query.is_cuda and query.dtype != torch.float32 and _has_flash() else "sdpa"
    BACKENDS[name]
    if softcap is not None and name != "eager":
        raise ConfigError(f"--backend {name} cannot cap attention scores, as this model does: use auto or eager.")
    if name == "flash" and not _has_flash():
        raise MissingExtraError(
            "--backend flash needs flash-attn: pip install --no-build-isolation 'longext[flash]'. "
            "Or take --backend sdpa."
        )
    return name


@functools.cache
def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _sdpa_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job, mask: torch.Tensor | None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention on [P, H, L, D]: no mask for square causal pieces, so flash may run."""
    # mask-free kernels know grouped heads on a CPU and in half precision
    grouped = k.shape[1] != q.shape[1] and mask is None and (q.device.type == "cpu" or q.dtype != torch.float32)
    if not grouped:
        k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=job.scale, dropout_p=job.dropout, enable_gqa=grouped
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
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    weights = F.dropout(scores.masked_fill(~mask, float("-inf")).softmax(-1), job.dropout)
    return weights.to(v.dtype) @ v


def _repeat(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def _by_pieces(kernel: Kernel) -> Backend:
    """Make a backend of a kernel for [P, H, L, D] pieces."""

    def backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
        if job.window is not None and job.window < q.shape[2]:
            return _sliding(kernel, q, k, v, job)
        if job.layout.segments is None and job.cut.reorder is None:
            return _whole_rows(kernel, q, k, v, job)
        return _gathered(kernel, q, k, v, job)

    return backend


def _whole_rows(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
    """Every row is one segment: its pieces are slices and reshapes, no token is copied by index."""
    total = q.shape[2]
    size = total if job.cut.first is None or total <= job.group_size else job.group_size
    start = 0 if job.cut.first is None or size == total else job.cut.first(size) % size  # a shifted first piece
    middle = (total - start) // size * size
    cuts = [(start, start), (middle, size), (total - start - middle, total - start - middle)]
    cuts = [cut for cut in cuts if cut[0]]
    if len(cuts) == 1:
        return _tile(kernel, q, k, v, size, job)
    # split, not slices: the gradient of a split is one concatenation, that of a slice a whole row of zeros
    queries, keys, values = (x.split([length for length, _ in cuts], 2) for x in (q, k, v))
    sizes = [size for _, size in cuts]
    return torch.cat([_tile(kernel, *part, job) for part in zip(queries, keys, values, sizes, strict=True)], 1)


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
    """General layouts: gather each bucket of pieces, attend, scatter. Padding is at a piece's end: causal hides it."""
    flat = [_flat(x) for x in (q, k, v)]
    outputs = []
    for bucket in job.layout.buckets(job.cut, job.group_size, q.device):
        queries, keys, values = (x[bucket.index].transpose(1, 2) for x in flat)
        outputs.append((bucket, kernel(queries, keys, values, job, None)))
    return _scattered(q, outputs)


def _sliding(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
    """Sliding-window layers: queries in chunks of the window W against their own and the previous chunk.

    A segment's first chunk is plain causal attention; all others share one [W, 2 W] band. Time and memory grow with
    N * W, not with N^2.
    """
    window = job.window or q.shape[2]
    firsts, rest, before = job.layout.chunks(window, q.device)
    flat = [_flat(x) for x in (q, k, v)]
    outputs = []
    for bucket in firsts:
        queries, keys, values = (x[bucket.index].transpose(1, 2) for x in flat)
        outputs.append((bucket, kernel(queries, keys, values, job, None)))
    if rest is not None and before is not None:
        place = torch.arange(2 * window, device=q.device)
        distance = place[window:, None] - place  # rows: the chunk's queries; columns: the chunk before, then its own
        seen = torch.cat([before, rest.index], 1)
        queries, keys, values = flat[0][rest.index], flat[1][seen], flat[2][seen]
        band = (distance >= 0) & (distance < window)
        out = kernel(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), job, band)
        outputs.append((rest, out))
    return _scattered(q, outputs)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] -> [B N, H, D]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _scattered(q: torch.Tensor, outputs: list[tuple[Bucket, torch.Tensor]]) -> torch.Tensor:
    """Put the outputs [P, H, L, D] of buckets of pieces back in place: [B, N, H, D], zeros for tokens of no piece."""
    rows, heads, length, width = q.shape
    indices, parts = [], []
    for bucket, out in outputs:
        part = out.transpose(1, 2)
        real = bucket.real
        indices.append(bucket.index.reshape(-1) if real is None else bucket.index[real])
        parts.append(part.reshape(-1, heads, width) if real is None else part[real])
    empty = q.new_zeros(rows * length, heads, width)
    if parts:
        empty = empty.index_put((torch.cat(indices),), torch.cat(parts).to(q.dtype))
    return empty.view(rows, length, heads, width)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, job: Job) -> torch.Tensor:
    """flash-attn's variable-length kernel: all pieces of all rows in one call, boundaries in cu_seqlens."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    rows, heads, length, width = q.shape
    flat = [_flat(x) for x in (q, k, v)]
    index, ends, longest = job.layout.boundaries(job.cut, job.group_size, q.device)
    window = (-1, -1) if job.window is None else (job.window - 1, 0)
    out: torch.Tensor = flash_attn_varlen_func(
        *(flat if index is None else [x[index] for x in flat]),
        ends,
        ends,
        longest,
        longest,
        dropout_p=job.dropout,
        softmax_scale=job.scale,
        causal=True,
        window_size=window,
    )
    if index is not None:
        out = q.new_zeros(rows * length, heads, width).index_put((index,), out)
    return out.view(rows, length, heads, width)


BACKENDS.register("flash", _flash)
BACKENDS.register("sdpa", _by_pieces(_sdpa_kernel))
BACKENDS.register("eager", _by_pieces(_eager_kernel))
