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

from longext.attention.variant import Cut
from longext.errors import ConfigError

_NUM_SIZES = 8  # ragged pieces are padded to one of this many lengths, so that few kernel calls serve them all


@dataclass(frozen=True)
class Columns:
    """A chunk of every row: queries are the tokens start .. stop - 1, keys the tokens first .. stop - 1."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Span:
    """Queries of one piece, and the keys that the last of them sees: those before the first query, then the queries.

    Attributes:
        queries, keys: int64, token numbers (row * tokens of a row + position) in the queries' and the keys' tensor.
    """

    queries: NDArray[np.int64]
    keys: NDArray[np.int64]


@dataclass(frozen=True)
class Bucket:
    """Spans of one (padded) length.

    Attributes:
        queries: int64 [P, L], token numbers; padding repeats the span's last token.
        keys: int64 [P, M], M >= L; padded alike.
        real: bool [P, L], False on padding; None if there is none.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor | None


@dataclass(frozen=True)
class Boundaries:
    """What a variable-length kernel wants of queries or keys.

    Attributes:
        index: token numbers in the order of spans, int64, or None if that is the tokens' own order.
        ends: the spans' cumulative lengths with a leading 0, int32.
        longest: the longest span.
    """

    index: torch.Tensor | None
    ends: torch.Tensor
    longest: int


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

    @property
    def whole(self) -> Columns:
        """All columns at once."""
        return Columns(0, self.length, 0)

    def reach(self, cut: Cut, group_size: int, window: int | None, start: int) -> int:
        """Return the first column that any token from column `start` on sees, `start` itself if none sees an earlier.

        Args:
            window: tokens a query sees, itself included, or None.

        Raises:
            ConfigError: a cut that reorders tokens: there earlier tokens see later ones.
        """
        if cut.reorder is not None:
            raise ConfigError("s2-wrapped attends to later tokens, so that no chunk is complete: use --attention s2.")
        key = ("reach", cut, group_size, window, start)
        if key not in self._cache:
            firsts = [start]
            for segment in self._all_segments():
                at = int(np.searchsorted(segment % self.length, start))
                begin = _piece_of(at, len(segment), cut, group_size)
                if window is not None:
                    begin = max(begin, at - window)
                if begin < at < len(segment):
                    firsts.append(int(segment[begin]) % self.length)
            self._cache[key] = min(firsts)
        first: int = self._cache[key]
        return first

    def spans(self, cut: Cut, group_size: int, columns: Columns, window: int | None = None) -> list[Span]:
        """Return the spans of all pieces with a query in `columns`, in token order.

        Args:
            window: tokens a query sees, itself included; a kernel hides those of its span that are further away.
        """
        spans = []
        for segment in self._all_segments():
            if cut.reorder is not None:
                spans += [Span(piece, piece) for piece in cut_segment(segment, cut, group_size)]
                continue
            begin, end = np.searchsorted(segment % self.length, (columns.start, columns.stop)).tolist()
            while begin < end:
                first = _piece_of(begin, len(segment), cut, group_size)
                first = first if window is None else max(first, begin - window)
                stop = min(end, _next_piece(begin, len(segment), cut, group_size))
                spans.append(self._span(segment, first, begin, stop, columns))
                begin = stop
        return spans

    def boundaries(
        self, cut: Cut, group_size: int, columns: Columns, window: int | None, device: torch.device
    ) -> tuple[Boundaries, Boundaries]:
        """Return the boundaries of queries and of keys, made once per batch."""
        key = ("boundaries", cut, group_size, columns, window)
        if key not in self._cache:
            spans = self.spans(cut, group_size, columns, window)
            queries = _boundaries([span.queries for span in spans], columns.stop - columns.start, self, device)
            keys = _boundaries([span.keys for span in spans], columns.stop - columns.first, self, device)
            self._cache[key] = (queries, keys)
        entry: tuple[Boundaries, Boundaries] = self._cache[key]
        return entry

    def buckets(self, cut: Cut, group_size: int, columns: Columns, device: torch.device) -> list[Bucket]:
        """Return all spans as few index tensors of equal length; made once per batch."""
        key = ("buckets", cut, group_size, columns)
        if key not in self._cache:
            self._cache[key] = _buckets(self.spans(cut, group_size, columns), device)
        entry: list[Bucket] = self._cache[key]
        return entry

    def windows(self, window: int, columns: Columns, device: torch.device) -> tuple[list[Bucket], Bucket | None]:
        """Return what sliding-window attention wants, made once per batch.

        Returns:
            (spans among the first `window` tokens of each segment; all later spans of at most `window` queries, each
            with the `window` keys before its first query, or None).
        """
        key = ("windows", window, columns)
        if key not in self._cache:
            firsts, rest = [], []
            for segment in self._all_segments():
                begin, end = np.searchsorted(segment % self.length, (columns.start, columns.stop)).tolist()
                if begin < min(window, end):
                    firsts.append(self._span(segment, 0, begin, min(window, end), columns))
                for at in range(max(begin, window), end, window):
                    rest.append(self._span(segment, at - window, at, min(at + window, end), columns))
            later = _bucket(window, rest, device) if rest else None
            self._cache[key] = (_buckets(firsts, device), later)
        entry: tuple[list[Bucket], Bucket | None] = self._cache[key]
        return entry

    def _all_segments(self) -> tuple[NDArray[np.int64], ...]:
        if self.segments is not None:
            return self.segments
        if ("rows",) not in self._cache:
            tokens = np.arange(self.num_rows * self.length, dtype=np.int64)
            self._cache["rows",] = tuple(tokens.reshape(self.num_rows, self.length))
        rows: tuple[NDArray[np.int64], ...] = self._cache["rows",]
        return rows

    def _span(self, segment: NDArray[np.int64], first: int, begin: int, end: int, columns: Columns) -> Span:
        """Return the span of queries begin .. end - 1 and keys first .. end - 1 of a segment."""
        keys = self._renumbered(segment[first:end], columns.first, columns.stop)
        if columns.first == columns.start:  # one numbering for both
            return Span(keys if begin == first else keys[begin - first :], keys)
        return Span(self._renumbered(segment[begin:end], columns.start, columns.stop), keys)

    def _renumbered(self, tokens: NDArray[np.int64], first: int, stop: int) -> NDArray[np.int64]:
        """Return token numbers of whole rows as those of a tensor that has the columns first .. stop - 1 alone."""
        if stop - first == self.length:
            return tokens
        return tokens // self.length * (stop - first) + tokens % self.length - first


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


def _piece_of(at: int, length: int, cut: Cut, group_size: int) -> int:
    """Return where the piece that holds place `at` of a segment of `length` tokens begins."""
    if cut.first is None or length <= group_size:
        return 0
    first = cut.first(group_size)
    return 0 if at < first else first + (at - first) // group_size * group_size


def _next_piece(at: int, length: int, cut: Cut, group_size: int) -> int:
    """Return where the piece after that of place `at` begins, or the segment ends."""
    if cut.first is None or length <= group_size:
        return length
    first = cut.first(group_size)
    return min(length, first if at < first else first + ((at - first) // group_size + 1) * group_size)


def _boundaries(parts: list[NDArray[np.int64]], columns: int, layout: Layout, device: torch.device) -> Boundaries:
    ends = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int32)  # flash-attn's cu_seqlens
    order = np.concatenate(parts) if parts else np.empty(0, np.int64)
    in_order = len(order) == layout.num_rows * columns and bool((np.diff(order) == 1).all())
    index = None if in_order else torch.from_numpy(order).to(device)
    longest = max((len(part) for part in parts), default=0)
    return Boundaries(index, torch.from_numpy(ends).to(device), longest)


def _buckets(spans: list[Span], device: torch.device) -> list[Bucket]:
    """Group spans by length, ragged ones rounded up to a multiple of (longest / 8); those with earlier keys alone."""
    square = [span for span in spans if len(span.keys) == len(span.queries)]
    counts: dict[int, int] = {}
    for span in square:
        counts[len(span.queries)] = counts.get(len(span.queries), 0) + 1
    step = max(1, max(counts, default=1) // _NUM_SIZES)
    # few lengths cost few calls as they are; of many, the full groups alone are worth a call without padding
    exact = set(counts) if len(counts) <= _NUM_SIZES else {max(counts)}
    groups: dict[tuple[int, int], list[Span]] = {}
    for span in square:
        length = len(span.queries)
        size = length if length in exact else -(-length // step) * step
        groups.setdefault((size, 0), []).append(span)
    for span in spans:
        if len(span.keys) > len(span.queries):
            groups.setdefault((len(span.queries), len(span.keys) - len(span.queries)), []).append(span)
    return [_bucket(size, group, device) for (size, _), group in sorted(groups.items())]


def _bucket(size: int, spans: list[Span], device: torch.device) -> Bucket:
    """Return spans with the same number of earlier keys as one bucket of `size` queries."""

    def padded(parts: list[NDArray[np.int64]], width: int) -> torch.Tensor:
        # padding repeats a valid number, so gathering needs no bounds; causal attention hides it, `real` drops it
        rows = np.stack([np.pad(part, (0, width - len(part)), mode="edge") for part in parts])
        return torch.from_numpy(rows).to(device)

    earlier = len(spans[0].keys) - len(spans[0].queries)
    lengths = np.array([len(span.queries) for span in spans])
    real = None if (lengths == size).all() else torch.from_numpy(np.arange(size) < lengths[:, None]).to(device)
    queries = padded([span.queries for span in spans], size)
    same = all(span.queries is span.keys for span in spans)
    keys = queries if same else padded([span.keys for span in spans], size + earlier)
    return Bucket(queries, keys, real)
