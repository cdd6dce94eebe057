"""Token caches on disk.

A cache is a directory: `tokens.bin` (uint32, little endian), `documents.bin` (int64: where each document starts, then
the end of the last), `labels.bin` (uint8, supervised data only: 1 if a token is trained on), `names.jsonl` (one
document name a line) and `meta.json`, which holds the size and SHA-256 of each: opening a cache checks them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from longext.checksums import find_damage, sum_files
from longext.errors import ConfigError, DataError
from longext.untrusted import read_json

SCHEMA = "longext.tokens/1"
_META = "meta.json"

_FILES = {"tokens.bin", "documents.bin", "names.jsonl"}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def cache_root() -> Path:
    """Return where token caches are: $LONGEXT_CACHE, or ~/.cache/longext/tokens."""
    chosen = os.environ.get("LONGEXT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache/longext/tokens"


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

    If another process finishes the same directory first, its cache is opened and this one is thrown away.

    Args:
        texts: read once, one at a time; either all of them have `trained` or none.
        meta: called for further keys of meta.json when every text has been read.
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
    digest, bounds = hashlib.sha256(), [0]
    num_trained = max_token = 0
    with contextlib.ExitStack() as stack:

        def create(name: str) -> IO[bytes]:
            return stack.enter_context((directory / name).open("wb"))

        tokens, names, labels = create("tokens.bin"), create("names.jsonl"), None
        for text in texts:
            ids = np.asarray(text.input_ids, dtype="<u4")
            bounds.append(bounds[-1] + len(ids))
            max_token = max(max_token, int(ids.max(initial=0)))
            names.write(json.dumps(text.id).encode() + b"\n")
            tokens.write(ids.tobytes())
            digest.update(ids.tobytes())
            if text.trained is not None:
                labels = labels or create("labels.bin")
                mask = np.asarray(text.trained, dtype=np.uint8)
                num_trained += int(mask.sum())
                labels.write(mask.tobytes())
                digest.update(mask.tobytes())
            if on_progress is not None:
                on_progress(bounds[-1])
    np.asarray(bounds, dtype="<i8").tofile(directory / "documents.bin")
    return {
        "num_tokens": bounds[-1],
        "num_trained": bounds[-1] if labels is None else num_trained,
        "num_documents": len(bounds) - 1,
        "max_token": max_token,
        "tokens_sha256": digest.hexdigest(),
    }
