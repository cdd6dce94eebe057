"""What an unfinished run has answered and scored: JSON lines under a fingerprint of the model and of all questions.

Each process of a run writes a file of its own beside the main one's, and reads those of all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longext.errors import ConfigError, DataError
from longext.models.protocol import LanguageModel
from longext.processes.dealing import Row, deal, files_of_all, own_file, share, workers_of
from longext.untrusted import decode, parse_json, read_bytes

PREDICTIONS_SCHEMA = "longext.predictions/1"
PACE = "(pace)"  # the row that makes a run that goes on cut the same batches: no answer
_PACE_LINE = json.dumps({"id": PACE})[:-1].encode()
_UNTOLD = ("num_threads",)  # what may differ between two runs whose answers belong together
_SCORES = "scores"  # the fingerprint of a file whose rows are named after model and text themselves
_SYNC_SECONDS = 1.0
_ARRAYS = ("float32", "float64", "bool")
_checksums: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def fingerprint_of(model: LanguageModel, questions: Iterable[str]) -> str:
    """Return a SHA-256 over the questions and what the model says of itself, its ending tokens and all its weights."""
    return _fingerprint(model, model.weights_checksum(), questions)


def _fingerprint(model: LanguageModel, weights: str, questions: Iterable[str]) -> str:
    facts = {key: value for key, value in model.describe().items() if key not in _UNTOLD}
    facts["asking"] = str(model.asking)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(weights.encode())
    for question in questions:
        digest.update(question.encode() + b"\n")
    return digest.hexdigest()


def tokens_hash(input_ids: Sequence[int]) -> str:
    """Return a SHA-256 over token ids."""
    return hashlib.sha256(json.dumps(list(input_ids)).encode()).hexdigest()


def hash_of(hashes: Iterable[str]) -> str:
    """Return a SHA-256 over hashes, in the order of their values: that of the prompts of a run."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


# --- rows by name -----------------------------------------------------------------------------------------------------


class Journal:
    """Rows kept by name in the file of this process, and found in those of all: a `Keeper`.

    Args:
        path: the main process's file; it is started if there is none.
        fingerprint: of the model and of all questions.
        check: raises KeyError, TypeError or ValueError for what is no row of this kind.

    Raises (when read):
        ConfigError: rows with another fingerprint.
        DataError: it is no such file, or a line of it cannot be read.
    """

    def __init__(self, path: Path, fingerprint: str, check: Callable[[Row], object] = lambda row: None) -> None:
        self.path, self._fingerprint, self._check = path, fingerprint, check
        self._synced = time.monotonic()

    def read(self) -> dict[str, Row]:
        """Return the rows of all files by name; what was cut off in this process's own is dropped from it."""
        own = own_file(self.path)
        rows = list(self._others(own))
        rows += [(own, number, row) for number, row in open_answers(own, self._fingerprint)]
        return {row["id"]: row for _, _, row in map(self._checked, rows)}

    def _others(self, own: Path) -> Iterator[tuple[Path, int, Row]]:
        for file in files_of_all(self.path):
            if file != own:
                _, answers = _read(file, self._fingerprint)
                yield from ((file, *answer) for answer in answers)

    def _checked(self, place: tuple[Path, int, Row]) -> tuple[Path, int, Row]:
        path, number, row = place
        try:
            row = {key: _unpacked(value) for key, value in row.items()} | {"id": str(row["id"])}
            self._check(row)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number} is no answer that longext wrote. Remove the file.") from error
        return path, number, row

    def add(self, rows: Mapping[str, Row]) -> None:
        """Append rows; they are on the disk within a second of work."""
        now = time.monotonic()
        is_time = now - self._synced >= _SYNC_SECONDS
        self._synced = now if is_time else self._synced
        append_answers(own_file(self.path), [{"id": name, **row} for name, row in rows.items()], sync=is_time)


class _Scores(Journal):
    """The file of scores of a command: read once, since names say of which model and text a row is."""

    def read(self) -> dict[str, Row]:
        """Return the rows of all files by name."""
        known = share().known
        if self.path not in known:
            known[self.path] = super().read()
        found: dict[str, Row] = known[self.path]
        return found


def kept_scores(model: Any, kind: str, items: Sequence[Any]) -> tuple[list[str], Journal | None]:
    """Return names of items to be scored, over the model and what is scored, and the file that keeps their rows.

    Outside `sharing` with a file nothing is kept, and names are numbers.

    Args:
        kind: of the rows.
        items: what is scored of each, as JSON.
    """
    path = share().scores
    if path is None:
        return [str(number) for number in range(len(items))], None
    if model not in _checksums:
        _checksums[model] = model.weights_checksum()
    begin = hashlib.sha256(f"{_fingerprint(model, _checksums[model], ())} {kind} ".encode())
    names = []
    for item in items:
        digest = begin.copy()
        digest.update(json.dumps(item).encode())
        names.append(digest.hexdigest())
    return names, _Scores(path, _SCORES)


def score_each(
    model: Any,
    kind: str,
    items: Sequence[Any],
    answer: Callable[[int], Row],
    on_progress: Callable[[int], object] | None = None,
    weights: Sequence[int] | None = None,
) -> list[Row]:
    """Return the row that `answer` gives for each item, by number: one at a time, dealt, and kept as `kept_scores`.

    Args:
        weights: what each counts in `on_progress`; default 1.
    """
    names, keeper = kept_scores(model, kind, items)
    one_by_one, workers = [[number] for number in range(len(items))], workers_of(model)
    return deal(
        names,
        one_by_one,
        lambda batch: [answer(batch[0])],
        keeper=keeper,
        on_progress=on_progress,
        weights=weights,
        workers=workers,
    )


def _packed(value: Any) -> Any:
    """Return an array of float32 or bool as JSON."""
    return {"dtype": str(value.dtype), "base64": base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()}


def _unpacked(value: Any) -> Any:
    if not isinstance(value, dict) or value.keys() != {"dtype", "base64"}:
        return value
    if value["dtype"] not in _ARRAYS:
        raise ValueError(value["dtype"])
    return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"])


# --- one file ---------------------------------------------------------------------------------------------------------


def open_answers(path: Path, fingerprint: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number, answer) of what `path` holds, dropping a line that was cut off.

    The file is started if there is none, or none with an answer.

    Raises:
        ConfigError: its answers have another fingerprint.
        DataError: it is no file of answers, or a line is not JSON.
    """
    size, answers = _read(path, fingerprint)
    if size is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        append_answers(path, [{"schema": PREDICTIONS_SCHEMA, "fingerprint": fingerprint}])
    elif size < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(size)
    return answers


def _read(path: Path, fingerprint: str) -> tuple[int | None, list[tuple[int, Row]]]:
    """Return (bytes of the whole lines, (line number, row) of each); None for the bytes if the file is to be started.

    Raises:
        ConfigError, DataError: as `open_answers`.
    """
    content = read_bytes(path, limit=None) if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    header, *lines = whole.splitlines() or [b""]
    known = _parse(header, path, 1) if whole else {}
    if whole and known.get("schema") != PREDICTIONS_SCHEMA:
        raise DataError(f"{path} is no file of predictions that longext wrote: it has no header line.")
    is_same = known.get("fingerprint") == fingerprint
    if not is_same and not _has_answer(lines):
        return None, []
    if not is_same:
        raise ConfigError(
            f"{path} holds answers to other prompts or of another model: they are not used. Run with the settings it "
            "was started with, or choose another -o to start over."
        )
    return len(whole), [(number, _parse(line, path, number)) for number, line in enumerate(lines, 2)]


def _has_answer(lines: Iterable[bytes]) -> bool:
    """Return True if one of these lines is an answer, not what was measured before the first."""
    return not all(line.startswith(_PACE_LINE) for line in lines)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}:{number}"
    value: dict[str, Any] = parse_json(decode(line, where), where, want=dict, constant=float)
    return value


def append_answers(path: Path, rows: Sequence[dict[str, Any]], *, sync: bool = True) -> None:
    """Append rows, in one write.

    Args:
        sync: wait until they are on the disk.
    """
    with path.open("ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False, default=_packed) + "\n" for row in rows).encode())
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _files(path: Path) -> list[Path]:
    """Return the files of answers at `path`, a file with those of other processes, or a folder."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else files_of_all(path)
    headers = {file: read_bytes(file, limit=None).partition(b"\n")[0] for file in files}
    return [file for file, header in headers.items() if not header or PREDICTIONS_SCHEMA.encode() in header]


def holds_answers(path: Path) -> bool:
    """Return True if a file of answers, or one in a folder, has an answer behind its header."""
    return any(_has_answer(read_bytes(file, limit=None).splitlines()[1:]) for file in _files(path))


def remove_answers(path: Path) -> None:
    """Remove a file of answers, or those in a folder and the folder if nothing else is in it."""
    for file in _files(path):
        file.unlink()
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
