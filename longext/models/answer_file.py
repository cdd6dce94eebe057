"""The answers of an unfinished run: JSON lines under a fingerprint of the model and of all questions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longext.errors import ConfigError, DataError
from longext.models.protocol import LanguageModel
from longext.untrusted import decode, parse_json, read_bytes

PREDICTIONS_SCHEMA = "longext.predictions/1"
_UNTOLD = ("num_threads",)  # what may differ between two runs whose answers belong together


def fingerprint_of(model: LanguageModel, questions: Iterable[str]) -> str:
    """Return a SHA-256 over the questions and what the model says of itself, its ending tokens and all its weights."""
    facts = {key: value for key, value in model.describe().items() if key not in _UNTOLD}
    facts["asking"] = str(model.asking)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(model.weights_checksum().encode())
    for question in questions:
        digest.update(question.encode() + b"\n")
    return digest.hexdigest()


def tokens_hash(input_ids: Sequence[int]) -> str:
    """Return a SHA-256 over token ids."""
    return hashlib.sha256(json.dumps(list(input_ids)).encode()).hexdigest()


def hash_of(hashes: Iterable[str]) -> str:
    """Return a SHA-256 over hashes, in the order of their values: that of the prompts of a run."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def open_answers(path: Path, fingerprint: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number, answer) of what `path` holds, dropping a line that was cut off.

    The file is started if there is none, or none with an answer.

    Raises:
        ConfigError: its answers have another fingerprint.
        DataError: it is no file of answers, or a line is not JSON.
    """
    content = read_bytes(path, limit=None) if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    header, *lines = whole.splitlines() or [b""]
    known = _parse(header, path, 1) if whole else {}
    if whole and known.get("schema") != PREDICTIONS_SCHEMA:
        raise DataError(f"{path} is no file of predictions that longext wrote: it has no header line.")
    is_same = known.get("fingerprint") == fingerprint
    if not lines and not is_same:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        append_answers(path, [{"schema": PREDICTIONS_SCHEMA, "fingerprint": fingerprint}])
        return []
    if not is_same:
        raise ConfigError(
            f"{path} holds answers to other prompts or of another model: they are not used. Run with the settings it "
            "was started with, or choose another -o to start over."
        )
    answers = [(number, _parse(line, path, number)) for number, line in enumerate(lines, 2)]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return answers


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}:{number}"
    value: dict[str, Any] = parse_json(decode(line, where), where, want=dict, constant=float)
    return value


def append_answers(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows and wait until they are on the disk."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def _files(path: Path) -> list[Path]:
    """Return the files of answers at `path`, a file or a folder."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    headers = {file: read_bytes(file, limit=None).partition(b"\n")[0] for file in files}
    return [file for file, header in headers.items() if not header or PREDICTIONS_SCHEMA.encode() in header]


def holds_answers(path: Path) -> bool:
    """Return True if a file of answers, or one in a folder, has more than its header."""
    return any(len(read_bytes(file, limit=None).splitlines()) > 1 for file in _files(path))


def remove_answers(path: Path) -> None:
    """Remove a file of answers, or those in a folder and the folder if nothing else is in it."""
    for file in _files(path):
        file.unlink()
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
