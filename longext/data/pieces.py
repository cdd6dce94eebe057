"""Training rows that never cross a document: pieces of one document, or one supervised example, each."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from longext.data.packing import IGNORED, Row, TokenCache, TokenRows
from longext.errors import DataError


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
                f"No document has the {self.minimum:,} tokens that reading a memory takes: the longest has "
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
