"""The fixed-length training rows cut from a token cache.

Rows are a pure function of (seed, row number), so neither the number of processes nor the step a run resumes from
changes what is trained on.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from longext.data.cache import TokenCache
from longext.errors import ConfigError, DataError
from longext.registry import did_you_mean

IGNORED = -100  # transformers' label of a token that is not trained on
POSITIONS = ("plain", "pose")
_POSE_STREAM = 1  # keeps the draws of positions apart from those of the row order
_PACKING_WINDOW = 1024  # examples that are packed together; larger wastes less padding and mixes lengths less

Row = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Windows:
    """What rows of mixed windows are (arXiv 2502.20082, section 3.3): documents apart, some rows of short pieces alone.

    Attributes:
        length: L, the most tokens of a short document.
        share: of the rows whose documents are cut into pieces of at most `length` tokens, 0 to 1.
    """

    length: int
    share: float

    def is_short(self, index: int) -> bool:
        """True for the rows that are cut: any n in a row hold n * share of them, rounded up or down."""
        return int((index + 1) * self.share) > int(index * self.share)

    def place(self, row: Row, *, short: bool) -> Row:
        """Return `row` with the position of each token in its document, in pieces of at most L tokens if `short`."""
        positions = document_positions(row["document_ids"])
        if short:
            positions = positions % self.length
            begins = positions == 0
            row["document_ids"] = begins.cumsum(0) - 1
            row["labels"] = row["labels"].masked_fill(begins, IGNORED)  # nothing in its piece predicts it
        return {**row, "position_ids": positions}


class TokenRows(Dataset[Row]):
    """Exactly `num_rows` rows of `length` tokens, row i a pure function of (seed, i).

    Every epoch of `num_available` rows is a seeded permutation of the same rows. A row is int64 tensors [length]:
    `input_ids`; `labels`, the same ids with -100 if a token is not trained on (not shifted); `document_ids`,
    0, 0, 1, ... by document within the row and -1 for padding; and `position_ids` if positions are "pose" or windows
    are mixed.

    Args:
        cache: the tokens.
        length: tokens in a row.
        seed: orders the rows and places the positions.
        num_rows: rows served, over as many epochs as it takes.
        positions: "plain" (the model counts) or "pose" (`pose_positions`).
        target_length: with "pose", the length that positions reach.
        windows: of a run with mixed windows, else None.

    Raises:
        ConfigError: unknown `positions`, or a `target_length` below `length`.
        DataError: the tokens fill no row.
    """

    def __init__(
        self,
        cache: TokenCache,
        length: int,
        seed: int,
        num_rows: int,
        *,
        positions: str = "plain",
        target_length: int | None = None,
        windows: Windows | None = None,
    ) -> None:
        check_positions(positions, length, target_length)
        self.windows = windows
        self.cache, self.length, self.seed, self.num_rows = cache, length, seed, num_rows
        self.target_length = target_length if positions == "pose" else None
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self.num_available = self._prepare()

    def _prepare(self) -> int:
        """Return how many different rows the tokens make (DataError if none)."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        row = self._row(self._place(index)[1])
        if self.target_length is not None:
            generator = np.random.default_rng([self.seed, index, _POSE_STREAM])
            row["position_ids"] = pose_positions(self.length, self.target_length, generator)
        if self.windows is not None:
            row = self.windows.place(row, short=self.windows.is_short(index))
        return row

    @property
    def report(self) -> dict[str, Any]:
        """What a run manifest says of the data: its hashes and counts, and the rows made of it."""
        hidden = ("schema", "key", "pad_token_id", "max_token", "files")
        counts = {key: value for key, value in self.cache.meta.items() if key not in hidden}
        return {**counts, "row_length": self.length, "rows_per_epoch": self.num_available}

    def describe(self, index: int) -> str:
        """Return the documents and tokens that row `index` holds, as an error names them."""
        epoch, place = self._place(index)
        return f"row {index:,} (epoch {epoch}): {self._describe(place)}"

    def _place(self, index: int) -> tuple[int, int]:
        """Return the epoch of row `index` and which of the `num_available` rows it is."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        epoch, offset = divmod(index, self.num_available)
        if epoch != self._epoch:
            # a generator for each epoch, not one that goes on: a resumed run starts anywhere and finds the same row
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_available)
            self._epoch, self._order = epoch, order
        return epoch, int(self._order[offset])

    def _row(self, place: int) -> Row:
        raise NotImplementedError

    def _describe(self, place: int) -> str:
        raise NotImplementedError

    def _padded(self, spans: Iterable[tuple[int, int]]) -> Row:
        """Return one row of the tokens in `spans` of the cache, one behind the other, padded at the right."""
        input_ids = torch.full((self.length,), int(self.cache.meta.get("pad_token_id", 0)), dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED)
        document_ids = torch.full_like(input_ids, -1)
        filled = 0
        for number, (start, end) in enumerate(spans):
            here = slice(filled, filled + end - start)
            filled = here.stop
            input_ids[here] = torch.from_numpy(self.cache.tokens[start:end].astype(np.int64))
            labels[here] = input_ids[here]
            if self.cache.trained is not None:
                labels[here][torch.from_numpy(self.cache.trained[start:end] == 0)] = IGNORED
            document_ids[here] = number
        return {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}


class PackedRows(TokenRows):
    """Continued pre-training: the stream of all documents cut into rows of `length`, a shorter tail left out.

    Args:
        separate_documents: do not train on the first token of a document, which nothing in it predicts (a row's own
            first token is never predicted anyway).
    """

    def __init__(
        self,
        cache: TokenCache,
        length: int,
        seed: int,
        num_rows: int,
        *,
        separate_documents: bool = False,
        **places: Any,
    ) -> None:
        super().__init__(cache, length, seed, num_rows, **places)
        self.separate_documents = separate_documents

    def _prepare(self) -> int:
        count = self.cache.num_tokens // self.length
        if not count:
            raise DataError(
                f"The data has {self.cache.num_tokens:,} tokens, too few for one row of {self.length:,}. "
                "Give more text (--data) or a shorter length."
            )
        return count

    def _row(self, place: int) -> Row:
        start = place * self.length
        input_ids = torch.from_numpy(self.cache.tokens[start : start + self.length].astype(np.int64))
        first, last = self._documents(start)
        begins = torch.zeros(self.length, dtype=torch.int64)
        begins[self.cache.bounds[first + 1 : last] - start] = 1
        labels = input_ids.clone()
        if self.separate_documents:
            labels[begins == 1] = IGNORED
        return {"input_ids": input_ids, "labels": labels, "document_ids": begins.cumsum(0)}

    def _documents(self, start: int) -> tuple[int, int]:
        """Return the range of documents (first, last + 1) with a token in the row that starts at `start`."""
        bounds = self.cache.bounds
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        return first, int(np.searchsorted(bounds, start + self.length, side="left"))

    def _describe(self, place: int) -> str:
        start = place * self.length
        names = self.cache.names(*self._documents(start))
        return f"tokens {start:,} to {start + self.length - 1:,} of the data, from {_spell_names(names)}"


class PackedExamples(TokenRows):
    """Supervised data: whole examples packed into rows of `length`, padded at the right, none ever split.

    The packing is made once from the seed (best fit, longest first, within shuffled windows); epochs reorder its rows.

    Raises:
        DataError: an example is longer than `length`.
    """

    def _prepare(self) -> int:
        lengths = np.diff(self.cache.bounds)
        if lengths.max() > self.length:
            raise DataError(
                f"An example has {lengths.max():,} tokens, more than the row length {self.length:,}: "
                "the cache was made for another length."
            )
        self._packed = pack_lengths(lengths, self.length, self.seed)
        return len(self._packed)

    def _row(self, place: int) -> Row:
        bounds = self.cache.bounds
        return self._padded((int(bounds[example]), int(bounds[example + 1])) for example in self._packed[place])

    def _describe(self, place: int) -> str:
        examples = self._packed[place]
        names = [name for example in examples for name in self.cache.names(example, example + 1)]
        return f"{len(examples)} examples, {_spell_names(names)}"


class DocumentRows(TokenRows):
    """Each row is a piece of one document: `length` tokens, or the shorter end of it, padded at the right.

    Row tensors are int64 [length]: `input_ids`; `labels`, with -100 if nothing is scored; and `num_tokens` [],
    without the padding.

    Args:
        minimum: shorter pieces are left out, and so are those of supervised data in which nothing is scored.
        skip: the first `skip` tokens of a piece are not scored.

    Raises:
        DataError: no piece is left.
    """

    def __init__(self, cache: TokenCache, length: int, seed: int, num_rows: int, *, minimum: int, skip: int) -> None:
        self.minimum, self.skip = minimum, skip
        super().__init__(cache, length, seed, num_rows)

    def _prepare(self) -> int:
        long = [
            (start, min(start + self.length, end))
            for begin, end in itertools.pairwise(self.cache.bounds.tolist())
            for start in range(begin, end, self.length)
            if min(start + self.length, end) - start >= self.minimum
        ]
        if not long:
            longest = int(np.diff(self.cache.bounds).max())
            raise DataError(
                f"No document has the {self.minimum:,} tokens that a training text needs: the longest has "
                f"{longest:,}. Give longer documents (--data) or a shorter --segment."
            )
        trained = self.cache.trained
        self._pieces = [(a, b) for a, b in long if trained is None or bool(trained[a + self.skip : b].any())]
        if not self._pieces:
            raise DataError(
                f"No example has a token to learn after its first {self.skip:,}, which no memory precedes: give "
                "examples whose answers come later (--data), or a shorter --segment."
            )
        return len(self._pieces)

    @property
    def report(self) -> dict[str, Any]:
        """Counts and hashes of the data, and how much of it the pieces hold."""
        return {**super().report, "num_piece_tokens": sum(end - start for start, end in self._pieces)}

    def _row(self, place: int) -> Row:
        start, end = self._pieces[place]
        row = self._padded([(start, end)])
        row["labels"][: self.skip] = IGNORED
        return {"input_ids": row["input_ids"], "labels": row["labels"], "num_tokens": torch.tensor(end - start)}

    def _describe(self, place: int) -> str:
        start, end = self._pieces[place]
        document = int(np.searchsorted(self.cache.bounds, start, side="right")) - 1
        (name,) = self.cache.names(document, document + 1)
        first = start - int(self.cache.bounds[document])
        return f"tokens {first:,} to {first + end - start - 1:,} of {name}"


def _spell_names(names: Sequence[str]) -> str:
    listed = ", ".join(names[:4])
    return listed if len(names) <= 4 else f"{listed} and {len(names) - 4:,} more"


def pack_lengths(lengths: NDArray[np.int64], length: int, seed: int) -> list[list[int]]:
    """Return which items of `lengths` share each row of `length`: best fit, longest first, in shuffled windows.

    Every item is in exactly one row and no row exceeds `length`; the same seed gives the same packing.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    for start in range(0, len(order), _PACKING_WINDOW):
        window = order[start : start + _PACKING_WINDOW]
        # stable: equal lengths keep the shuffled order on every platform, so the seed alone decides the packing
        window = window[np.argsort(-lengths[window], kind="stable")]
        free: list[tuple[int, int]] = []  # (tokens left, row), sorted
        for item in window.tolist():
            size = int(lengths[item])
            at = bisect.bisect_left(free, (size, -1))  # best fit: the least room that is enough
            left, row = free.pop(at) if at < len(free) else (length, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(item)
            bisect.insort(free, (left - size, row))
    return rows


def check_positions(positions: str, length: int, target_length: int | None) -> None:
    """Raise ConfigError if `positions` is unknown, or is "pose" without a `target_length` of at least `length`."""
    if positions not in POSITIONS:
        raise ConfigError(f"Unknown positions '{positions}'. {did_you_mean(positions, POSITIONS)}")
    if positions == "pose" and (target_length is None or target_length < length):
        described = "no target_length" if target_length is None else f"target_length {target_length:,}"
        raise ConfigError(f"positions 'pose' needs a target_length of at least the window {length:,}, got {described}.")


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Return the position of each token in its document, int64 [N], from the documents of a row [N]."""
    places = torch.arange(len(document_ids))
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[1:] = document_ids[1:] != document_ids[:-1]
    return places - places.masked_fill(~begins, 0).cummax(0).values


def pose_positions(
    length: int, target_length: int, generator: np.random.Generator, num_chunks: int = 2
) -> torch.Tensor:
    """Return skip-wise positions, int64 [length]: `num_chunks` runs of consecutive positions with random skips between.

    The row is cut at random places; chunk i is shifted by u_i, with u_0 = 0 and u_i uniform in
    u_{i-1} .. target_length - length, so that positions rise and the last stays below `target_length`
    (PoSE, arXiv 2309.10400, section 3.2).

    Raises:
        ConfigError: `target_length` < `length`, or more chunks than tokens.
    """
    if target_length < length or not 1 <= num_chunks <= length:
        raise ConfigError(
            f"PoSE needs length <= target_length and 1 to {length} chunks, "
            f"got length {length}, target_length {target_length}, {num_chunks} chunks."
        )
    cuts = np.sort(generator.choice(length - 1, num_chunks - 1, replace=False)) + 1
    positions = np.arange(length, dtype=np.int64)
    skip = 0
    for start, end in itertools.pairwise([*cuts, length]):
        skip = int(generator.integers(skip, target_length - length, endpoint=True))
        positions[start:end] += skip
    return torch.from_numpy(positions)


def collate_rows(rows: Sequence[Row]) -> Row:
    """Stack rows of one kind and length into int64 [B, length] tensors."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
