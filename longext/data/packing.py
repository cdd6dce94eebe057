"""Token caches on disk and the fixed-length training rows cut from them.

A cache is a directory: `tokens.bin` (uint32, little endian), `documents.bin` (int64: where each document starts, then
the end of the last), `labels.bin` (uint8, supervised data only: 1 if a token is trained on), `names.jsonl` (one
document name a line) and `meta.json`, which holds the size and SHA-256 of each: opening a cache checks them. Rows are a
pure function of (seed, row number), so neither the number of processes nor the step a run resumes from changes what is
trained on.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from longext.checksums import find_damage, sum_files
from longext.errors import ConfigError, DataError
from longext.registry import did_you_mean
from longext.untrusted import read_json

SCHEMA = "longext.tokens/1"
_META = "meta.json"
_FILES = {"tokens.bin", "documents.bin", "names.jsonl"}
IGNORED = -100  # transformers' label of a token that is not trained on
POSITIONS = ("plain", "pose")
_POSE_STREAM = 1  # keeps the draws of positions apart from those of the row order
_PACKING_WINDOW = 1024  # examples that are packed together; larger wastes less padding and mixes lengths less

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


Row = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """One document or example as token ids.

    Attributes:
        id: its name in its source.
        input_ids: its tokens, special ones included.
        trained: for each token whether it is trained on; None if all are.
    """

    id: str
    input_ids: Sequence[int]
    trained: Sequence[bool] | None = None


# --- the cache --------------------------------------------------------------------------------------------------------


class TokenCache:
    """A finished cache, read through memory maps (pickles as its path).

    Attributes:
        tokens: uint32 [T], every document one after the other.
        bounds: int64 [D + 1], document d is tokens[bounds[d]:bounds[d + 1]].
        trained: uint8 [T], or None if every token is trained on.
        meta: what meta.json holds.
    """

    def __init__(self, directory: Path, meta: Mapping[str, Any]) -> None:
        self.directory = directory
        self.meta = dict(meta)
        self.tokens: NDArray[np.uint32] = np.memmap(directory / "tokens.bin", dtype="<u4", mode="r")
        self.bounds: NDArray[np.int64] = np.memmap(directory / "documents.bin", dtype="<i8", mode="r")
        labels = directory / "labels.bin"
        self.trained: NDArray[np.uint8] | None = np.memmap(labels, np.uint8, mode="r") if labels.exists() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return open_token_cache, (self.directory,)

    @property
    def largest_id(self) -> int:
        """The largest token id that rows of this cache hold, what fills them included."""
        return max(int(self.meta["max_token"]), int(self.meta.get("pad_token_id") or 0))

    @property
    def num_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """How many documents or examples there are."""
        return len(self.bounds) - 1

    def names(self, first: int, last: int) -> list[str]:
        """Return the names of documents first .. last - 1."""
        with (self.directory / "names.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in itertools.islice(file, first, last)]


def read_meta(directory: Path) -> dict[str, Any]:
    """Return a cache's meta.json (OSError or DataError if it cannot be read)."""
    meta: dict[str, Any] = read_json(directory / _META, DataError, want=dict, keep_surrogates=True)
    return meta


def open_token_cache(directory: Path) -> TokenCache:
    """Return the cache in `directory`, after reading its files once to see that they are what was written.

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        meta = read_meta(directory)
        damage = find_damage(directory, meta["files"])
        if not set(meta["files"]) >= _FILES:
            damage = f"{_META} lists no {' and '.join(sorted(_FILES - set(meta['files'])))}"
        if damage is not None:
            raise ValueError(damage)
        cache = TokenCache(directory, meta)
        counts = (cache.num_tokens, cache.num_documents, int(cache.bounds[-1]))
        whole = meta["schema"] == SCHEMA and counts == (meta["num_tokens"], meta["num_documents"], meta["num_tokens"])
        marked = cache.num_tokens if cache.trained is not None else meta["num_trained"]
        whole = whole and isinstance(meta["max_token"], int)
        whole = whole and marked == cache.num_tokens == len(cache.tokens if cache.trained is None else cache.trained)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, DataError) as error:
        raise DataError(f"No token cache in {directory} ({error}). Delete the directory to build it again.") from error
    if not whole:
        raise DataError(f"The token cache in {directory} is damaged. Delete the directory to build it again.")
    return cache


def build_token_cache(
    texts: Iterable[TokenizedText],
    directory: Path,
    *,
    meta: Callable[[], Mapping[str, Any]] = dict,
    on_progress: Callable[[int], None] | None = None,
    source: str = "The data",
) -> TokenCache:
    """Write `texts` as a cache that appears under its name only when it is complete, and open it.

    Where another process finishes the same directory first, its cache is opened and this one is thrown away.

    Args:
        texts: read once, one at a time; either all of them have `trained` or none.
        meta: asked for further keys of meta.json when every text has been read.
        on_progress: called with the number of tokens written so far.
        source: what the texts come from, for messages.

    Raises:
        DataError: no text has a token.
        ConfigError: the disk is full or not writable; nothing is left behind.
    """
    with _explained(directory.parent, *_FULL, *_CLOSED):
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        with _explained(directory.parent, *_FULL):
            counts = _write_texts(texts, staging, on_progress)
        if not counts["num_tokens"]:
            raise DataError(
                f"{source} holds no text. Check the file, the split (--split) and the column (--text-field)."
            )
        sums = sum_files(staging, leave_out=_META)
        text = json.dumps({"schema": SCHEMA, **counts, **meta(), "files": sums}, indent=2, ensure_ascii=False)
        (staging / _META).write_text(text + "\n", encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp makes it private; a shared cache is meant to be read by others
        _publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return open_token_cache(directory)


@contextlib.contextmanager
def _explained(folder: Path, *kinds: int) -> Iterator[None]:
    """Turn a disk's errors of these kinds into a message that says how to use another."""
    try:
        yield
    except OSError as error:
        if error.errno not in kinds:
            raise
        raise ConfigError(
            f"Cannot write the token cache in {folder} ({error.strerror}); nothing was left there. "
            "Set LONGEXT_CACHE to a folder with room."
        ) from error


def _publish(staging: Path, directory: Path) -> None:
    """Rename `staging` to `directory`; a complete cache that is already there stays, a damaged one is replaced."""
    with contextlib.suppress(OSError):
        staging.rename(directory)
        return
    with contextlib.suppress(DataError):
        open_token_cache(directory)
        return
    aside = staging.with_name(staging.name.replace(".partial-", ".old-"))
    with contextlib.suppress(OSError):
        directory.rename(aside)
    try:
        staging.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_texts(
    texts: Iterable[TokenizedText], directory: Path, on_progress: Callable[[int], None] | None
) -> dict[str, Any]:
    """Write tokens, bounds, labels and names; return their counts and the SHA-256 of tokens and labels."""
    digest = hashlib.sha256()
    num_tokens = num_trained = num_documents = max_token = 0
    with contextlib.ExitStack() as stack:

        def create(name: str) -> IO[bytes]:
            return stack.enter_context((directory / name).open("wb"))

        tokens, bounds, names = create("tokens.bin"), create("documents.bin"), create("names.jsonl")
        labels: IO[bytes] | None = None
        bounds.write(np.int64(0).astype("<i8").tobytes())
        for text in texts:
            ids = np.asarray(text.input_ids, dtype="<u4")
            max_token = max(max_token, int(ids.max(initial=0)))
            data = ids.tobytes()
            num_tokens, num_documents = num_tokens + len(text.input_ids), num_documents + 1
            tokens.write(data)
            digest.update(data)
            bounds.write(np.int64(num_tokens).astype("<i8").tobytes())
            names.write(json.dumps(text.id).encode() + b"\n")
            if text.trained is not None:
                labels = labels or create("labels.bin")
                mask = np.asarray(text.trained, dtype=np.uint8)
                num_trained += int(mask.sum())
                labels.write(mask.tobytes())
                digest.update(mask.tobytes())
            if on_progress is not None:
                on_progress(num_tokens)
        trained = num_tokens if labels is None else num_trained
    return {
        "num_tokens": num_tokens,
        "num_trained": trained,
        "num_documents": num_documents,
        "max_token": max_token,
        "tokens_sha256": digest.hexdigest(),
    }


# --- rows -------------------------------------------------------------------------------------------------------------


class TokenRows(Dataset[Row]):
    """Exactly `num_rows` rows of `length` tokens, row i a pure function of (seed, i).

    Every epoch of `num_available` rows is a seeded permutation of the same rows. A row is int64 tensors [length]:
    `input_ids`; `labels`, the same ids with -100 if a token is not trained on (not shifted); `document_ids`,
    0, 0, 1, ... by document within the row and -1 for padding; and `position_ids` if positions are "pose".

    Args:
        cache: the tokens.
        length: tokens in a row.
        seed: orders the rows and places the positions.
        num_rows: rows served, over as many epochs as it takes.
        positions: "plain" (the model counts) or "pose" (`pose_positions`).
        target_length: with "pose", the length that positions reach.

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
    ) -> None:
        check_positions(positions, length, target_length)
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
        window = window[np.argsort(-lengths[window], kind="stable")]
        free: list[tuple[int, int]] = []  # (tokens left, row), sorted
        for item in window.tolist():
            size = int(lengths[item])
            at = bisect.bisect_left(free, (size, -1))
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
