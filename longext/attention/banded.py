"""Attention under position remapping: queries and keys come unrotated, each band rotates them its own way.

A text's plan (which keys each query sees in each band, cut into pieces, and the rotations) is made once per forward
pass and shared by all layers. Memory is linear in the text: no matrix of queries by keys exists.

Shape legend: B rows, H query heads, K key-value heads, n queries, M keys (those of the queries last), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from longext.attention.bands import Band, RemapSpec
from longext.attention.merged import Part, any_kernel, attend_pieces
from longext.attention.pieces import Piece, cut_intervals

Tensor = torch.Tensor
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotation:
    """How a model rotates queries and keys, so that they can be rotated at any positions.

    Attributes:
        inv_freq: [pairs].
        scaling: what multiplies cos and sin.
        is_halved: dimension p is paired with p + pairs; else 2p with 2p + 1.
    """

    inv_freq: Tensor
    scaling: float
    is_halved: bool

    def tables(self, positions: Tensor, like: Tensor) -> Tables:
        """Return cos and sin [..., pairs] of positions [..., 1 or pairs], from angles in float64, as `like` is."""
        angles = positions * self.inv_freq.to(positions.device, torch.float64)
        cos, sin = ((part * self.scaling).to(like.device, like.dtype) for part in (angles.cos(), angles.sin()))
        return cos, sin

    def plain_tables(self, numbers: Tensor, like: Tensor) -> Tables:
        """Return cos and sin [..., pairs] of whole numbers [...], computed in float32 as transformers does."""
        angles = numbers[..., None].float() * self.inv_freq.to(numbers.device).float()
        return (angles.cos() * self.scaling).to(like.dtype), (angles.sin() * self.scaling).to(like.dtype)

    def turn(self, x: Tensor, tables: Tables) -> Tensor:
        """Return x [..., n, D] rotated by tables [..., n, pairs]; dimensions beyond the pairs stay."""
        cos, sin = tables
        pairs = cos.shape[-1]
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if self.is_halved:
            a, b = turned[..., :pairs], turned[..., pairs:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
        a, b = turned[..., 0::2], turned[..., 1::2]
        return torch.cat([torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2), rest], -1)


@dataclass
class BandPlan:
    """Queries first .. first + n - 1 of one text behind all its earlier keys, planned for one forward pass.

    Attributes:
        spec: the remapping.
        rotation: of the model's layers.
        first, count: the first query's number and n.
        like: a tensor whose device and dtype the tables get.
    """

    spec: RemapSpec
    rotation: Rotation
    first: int
    count: int
    like: Tensor
    bands: list[tuple[list[Piece], tuple[int, int], tuple[int, int], Tables, Tables]] = field(init=False)
    scales: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        """Cut every band and make its tables."""
        device = torch.device("cpu") if self.like.device.type == "mps" else self.like.device  # which has no float64
        numbers = torch.arange(self.first, self.first + self.count, dtype=torch.float64, device=device)
        self.scales = query_scales(self.spec, numbers, self.like)
        self.bands = []
        for band in self.spec.bands:
            start, stop = interval(band, numbers)
            pieces = cut_intervals(start.long().cpu().numpy(), stop.long().cpu().numpy())
            if not pieces:
                continue
            queries, keys = _reach(pieces, "query"), _reach(pieces, "key")
            at = torch.arange(*keys, dtype=torch.float64, device=device)
            turns = (
                self.rotation.tables(_columns(band.query(numbers[slice(*queries)])), self.like),
                self.rotation.tables(_columns(band.key(at)), self.like),
            )
            self.bands.append((pieces, queries, keys, *turns))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return [B, H, n, D] of unrotated q [B, H, n, D] and k, v [B, K, M, D]."""
        if self.scales is not None:
            query = query * self.scales
        parts = []
        for pieces, queries, keys, query_turn, key_turn in self.bands:
            q = self.rotation.turn(query[:, :, slice(*queries)], query_turn)
            k = self.rotation.turn(key[:, :, slice(*keys)], key_turn)
            parts.append(Part(q, k, queries[0], keys[0], pieces))
        return attend_pieces(parts, value, self.count, scale * self.spec.temperature**2, any_kernel(query))


def interval(band: Band, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys that queries see in a band, float64 (first, end), none of them after the query."""
    start, stop = band.start(numbers).clip(min=0), band.stop(numbers).clip(min=0)
    return start, torch.minimum(stop, numbers + 1)


def query_scales(spec: RemapSpec, numbers: Tensor, like: Tensor) -> Tensor | None:
    """Return what multiplies queries of these numbers, [n, 1] in the dtype of `like`; None for 1 throughout."""
    if not spec.logn or float(numbers.max()) < spec.trained_length:
        return None
    wide = torch.log(numbers + 1) / torch.log(torch.tensor(float(spec.trained_length), dtype=torch.float64))
    return wide.clip(min=1)[..., None].to(like.device, like.dtype)


def _reach(pieces: list[Piece], side: str) -> tuple[int, int]:
    """Return the first and the end of the queries or keys that any piece holds."""
    firsts, ends = [], []
    for piece in pieces:
        first, step = getattr(piece, f"{side}_start"), getattr(piece, f"{side}_step")
        firsts.append(first)
        ends.append(first + step * (piece.count - 1) + (piece.queries if side == "query" else piece.keys))
    return min(firsts), max(ends)


@dataclass
class StepPlan:
    """One query per row behind all its keys: each key is seen in one band, so that one rotation of the keys will do.

    The query is rotated at its own number i, each key at i less the distance that its band makes of the two.

    Attributes:
        spec, rotation: as of `BandPlan`.
        starts: int64 [B], where each row's text begins (padding is before it); [1] if all begin alike.
        count: M.
        like: a tensor whose device and dtype the tables get.
    """

    spec: RemapSpec
    rotation: Rotation
    starts: Tensor
    count: int
    like: Tensor

    def __post_init__(self) -> None:
        """Make the tables and the mask."""
        device = torch.device("cpu") if self.like.device.type == "mps" else self.like.device
        starts = self.starts.to(device, torch.float64)
        numbers, query = torch.arange(self.count, dtype=torch.float64, device=device), self.count - 1 - starts
        rows = []
        for row, i in enumerate(query):
            j, own = numbers - starts[row], i[None]
            seen, positions = torch.zeros_like(j, dtype=torch.bool), j[:, None]
            for band in self.spec.bands:
                start, stop = interval(band, own)
                inside = (j >= start) & (j < stop)
                distance = _columns(band.query(own)) - _columns(band.key(j.clip(min=0)))
                positions = torch.where(inside[:, None], i - distance, positions)
                seen |= inside
            rows.append((positions, seen))
        positions = torch.stack([each for each, _ in rows])
        cos, sin = self.rotation.tables(positions, self.like)
        self.keys = cos[:, None], sin[:, None]
        cos, sin = self.rotation.tables(query[:, None], self.like)
        self.query = cos[:, None, None], sin[:, None, None]
        self.mask = torch.stack([seen for _, seen in rows])[:, None, None].to(self.like.device)
        scales = query_scales(self.spec, query, self.like)
        self.scales = None if scales is None else scales[:, None, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return [B, H, 1, D] of unrotated q [B, H, 1, D] and k, v [B, K, M, D]."""
        q = self.rotation.turn(query if self.scales is None else query * self.scales, self.query)
        k = self.rotation.turn(key, self.keys)
        groups = query.shape[1] != key.shape[1]
        mask = None if bool(self.mask.all()) else self.mask
        return F.scaled_dot_product_attention(
            q, k, value, attn_mask=mask, scale=scale * self.spec.temperature**2, enable_gqa=groups
        )


def _columns(positions: Tensor) -> Tensor:
    return positions if positions.ndim > 1 else positions[:, None]
