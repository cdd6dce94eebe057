"""Which tokens may attend to which: segments of a batch, cut into groups. No model, no kernel.

A *segment* is a run of tokens that attend to one another causally: a row without its padding, or one document of it.
S2-Attn (arXiv 2309.12307, section 3.2) cuts each segment into *pieces* of at most `group_size` tokens; attention is
causal inside a piece and zero across pieces. Every cut is described here as index arrays, once per batch, so that all
layers and all kernels share it.

Shape legend: B rows, N tokens of a row, T = B * N, P pieces, L tokens of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longext.attention.variant import WHOLE, Cut

_NUM_SIZES = 8  # ragged pieces are padded to one of this many lengths, so that few kernel calls serve them all


@dataclass(frozen=True)
class Bucket:
    """Pieces of one (padded) length.

    Attributes:
        index: int64 [P, L], flat token numbers (row * N + position); padding repeats the piece's last token.
        real: bool [P, L], False on padding; None if there is none.
    """

    index: torch.Tensor
    real: torch.Tensor | None


@dataclass(frozen=True)
class Layout:
    """The segments of one batch.

    Attributes:
        num_rows, length: B and N.
        segments: flat token numbers of each segment, in order; None if every row is one whole segment.
    """

    num_rows: int
    length: int
    segments: tuple[NDArray[np.int64], ...] | None = None
    _cache: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    def boundaries(
        self, cut: Cut, group_size: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor, int]:
        """Return what a variable-length kernel wants, made once per batch.

        Returns:
            (flat token numbers in the order of pieces, int64, or None if that is the tokens' own order; the pieces'
            cumulative lengths with a leading 0, int32; the longest piece).
        """
        key = ("boundaries", cut, group_size)
        if key not in self._cache:
            pieces = self.pieces(cut, group_size)
            ends = np.cumsum([0, *(len(piece) for piece in pieces)]).astype(np.int32)  # flash-attn's cu_seqlens
            order = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
            in_order = len(order) == self.num_rows * self.length and bool((np.diff(order) == 1).all())
            index = None if in_order else torch.from_numpy(order).to(device)
            longest = max((len(piece) for piece in pieces), default=0)
            self._cache[key] = (index, torch.from_numpy(ends).to(device), longest)
        entry: tuple[torch.Tensor | None, torch.Tensor, int] = self._cache[key]
        return entry

    def buckets(self, cut: Cut, group_size: int, device: torch.device) -> list[Bucket]:
        """Return all pieces as few index tensors of equal length; made once per batch."""
        key = ("buckets", cut, group_size)
        if key not in self._cache:
            self._cache[key] = [_bucket(group, device) for group in _by_size(self.pieces(cut, group_size))]
        entry: list[Bucket] = self._cache[key]
        return entry

    def chunks(self, window: int, device: torch.device) -> tuple[list[Bucket], Bucket | None, torch.Tensor | None]:
        """Return what sliding-window attention wants, made once per batch.

        Returns:
            (each segment's first `window` tokens; all later chunks of `window` tokens, or None; for each of those the
            flat numbers [P, window] of the tokens before it).
        """
        key = ("chunks", window)
        if key not in self._cache:
            segments = self.pieces(WHOLE, 0)
            firsts = [segment[:window] for segment in segments]
            starts = [(s, at) for s in segments for at in range(window, len(s), window)]
            rest = _bucket((window, [s[at : at + window] for s, at in starts]), device) if starts else None
            before = np.stack([s[at - window : at] for s, at in starts]) if starts else None
            self._cache[key] = (
                [_bucket(group, device) for group in _by_size(firsts)],
                rest,
                None if before is None else torch.from_numpy(before).to(device),
            )
        entry: tuple[list[Bucket], Bucket | None, torch.Tensor | None] = self._cache[key]
        return entry

    def pieces(self, cut: Cut, group_size: int) -> list[NDArray[np.int64]]:
        """Return all pieces in token order, each as its flat token numbers."""
        segments = self.segments
        if segments is None:
            tokens = np.arange(self.num_rows * self.length, dtype=np.int64)
            segments = tuple(tokens.reshape(self.num_rows, self.length))
        return [piece for segment in segments for piece in cut_segment(segment, cut, group_size)]


def make_layout(
    num_rows: int,
    length: int,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    separate_documents: bool = False,
) -> Layout:
    """Return the layout of a batch.

    Args:
        attention_mask: bool or int [B, N], zero on padding; holes are skipped. None: no padding.
        document_ids: int [B, N], -1 on padding, else the number of the token's document in its row.
        separate_documents: True makes each document a segment of its own.
    """
    real = np.ones((num_rows, length), dtype=bool)
    if attention_mask is not None:
        real &= attention_mask.cpu().numpy().astype(bool)
    documents = None if document_ids is None else document_ids.cpu().numpy()
    if documents is not None:
        real &= documents >= 0
    if real.all() and (documents is None or not separate_documents or bool((documents == documents[:, :1]).all())):
        return Layout(num_rows, length)
    segments: list[NDArray[np.int64]] = []
    for row in range(num_rows):
        positions = np.flatnonzero(real[row])
        runs = [positions]
        if documents is not None and separate_documents:
            runs = np.split(positions, np.flatnonzero(np.diff(documents[row][positions])) + 1)
        segments += [run.astype(np.int64) + row * length for run in runs if len(run)]
    return Layout(num_rows, length, tuple(segments))


def cut_segment(segment: NDArray[np.int64], cut: Cut, group_size: int) -> list[NDArray[np.int64]]:
    """Cut one segment into pieces; a segment of at most `group_size` tokens stays whole."""
    if cut.first is None or len(segment) <= group_size:
        return [segment]
    ordered = segment if cut.reorder is None else cut.reorder(segment, group_size)
    return np.split(ordered, np.arange(cut.first(group_size), len(segment), group_size))


def _by_size(pieces: list[NDArray[np.int64]]) -> list[tuple[int, list[NDArray[np.int64]]]]:
    """Group pieces by length, ragged ones rounded up to a multiple of (longest / 8)."""
    counts: dict[int, int] = {}
    for piece in pieces:
        counts[len(piece)] = counts.get(len(piece), 0) + 1
    step = max(1, max(counts, default=1) // _NUM_SIZES)
    # few lengths cost few calls as they are; of many, the full groups alone are worth a call without padding
    exact = set(counts) if len(counts) <= _NUM_SIZES else {max(counts)}
    groups: dict[int, list[NDArray[np.int64]]] = {}
    for piece in pieces:
        size = len(piece) if len(piece) in exact else -(-len(piece) // step) * step
        groups.setdefault(size, []).append(piece)
    return sorted(groups.items())


def _bucket(group: tuple[int, list[NDArray[np.int64]]], device: torch.device) -> Bucket:
    size, pieces = group
    # padding repeats a valid number, so gathering needs no bounds; causal attention hides it, `real` drops it
    index = np.stack([np.pad(piece, (0, size - len(piece)), mode="edge") for piece in pieces])
    lengths = np.array([len(piece) for piece in pieces])
    real = None if (lengths == size).all() else torch.from_numpy(np.arange(size) < lengths[:, None]).to(device)
    return Bucket(torch.from_numpy(index).to(device), real)
