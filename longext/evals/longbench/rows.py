"""Rows of LongBench: the authors' JSON-lines files in a folder, or their archive on the Hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.errors import DataError
from longext.untrusted import json_lines

HUB = "hub"
HUB_ID = "THUDM/LongBench"
_ARCHIVE = "data.zip"
_WHERE = (
    f"It is in {_ARCHIVE} of the Hub dataset {HUB_ID}: `hf download --repo-type dataset {HUB_ID} {_ARCHIVE}`, unpack "
    "it and give --data DIR/data."
)


@dataclass(frozen=True)
class LongBenchRow:
    """One question.

    Attributes:
        id: `_id` of the row, or its line number.
        question: `input`; empty in tasks without one.
        length: words (English) or characters (Chinese) as the authors counted them; None where unknown.
        all_classes: of classification tasks.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    length: int | None
    all_classes: tuple[str, ...]


def longbench_files(data: str, names: Sequence[str]) -> dict[str, Path | zipfile.Path]:
    """Return the file of each of `names` (<task> or <task>_e) that `data` has: a folder, or `hub`.

    Raises:
        DataError: no such folder, a folder in place of a file, or the archive cannot be had from the Hub.
    """
    folder: Path | zipfile.Path
    if data == HUB:
        folder = zipfile.Path(_fetch_archive(), "data/")
    else:
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise DataError(f"No folder '{data}' with LongBench's files. {_WHERE}")
    files = {name: folder / f"{name}.jsonl" for name in names}
    for file in files.values():
        if file.is_dir():
            raise DataError(f"{file} is a folder; it must be a file of JSON lines.")
    return {name: file for name, file in files.items() if file.is_file()}


def missing_file(name: str, data: str) -> DataError:
    """Return the error that says which file of LongBench `data` lacks, and where it is to be had."""
    return DataError(f"{data} has no {name}.jsonl. {_WHERE}")


def _fetch_archive() -> str:
    from huggingface_hub import hf_hub_download

    try:
        path: str = hf_hub_download(HUB_ID, _ARCHIVE, repo_type="dataset")
    except Exception as error:  # offline, unreachable, gone: many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"LongBench cannot be fetched from the Hub ({reason}). {_WHERE}") from error
    return path


def read_json_lines(file: Path | zipfile.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place as an error names it, object) for each line that is not empty.

    Raises:
        DataError: a line that is not UTF-8, or no JSON object.
    """
    yield from json_lines(file, form="{}, line {}", want=dict)


def read_longbench(file: Path | zipfile.Path, limit: int | None = None) -> list[LongBenchRow]:
    """Return the first `limit` rows of one task.

    Raises:
        DataError: a broken line (with file and number), a row without a field of the schema, or no row.
    """
    lines = itertools.islice(read_json_lines(file), limit)
    rows = [_row(where, value, number) for number, (where, value) in enumerate(lines, 1)]
    if not rows:
        raise DataError(f"{file} has no rows.")
    return rows


def _row(where: str, value: dict[str, Any], number: int) -> LongBenchRow:
    for key in ("input", "context"):
        if not isinstance(value.get(key), str):
            raise DataError(f"{where}: no text under '{key}' (found: {', '.join(sorted(value))}).")
    return LongBenchRow(
        str(value.get("_id") or number),
        value["input"],
        value["context"],
        *answers_of(where, value),
    )


def answers_of(where: str, value: dict[str, Any]) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """Return (answers, length, all classes) of a row or of a line of predictions.

    Raises:
        DataError: they are not of LongBench's schema.
    """
    answers, length, classes = value.get("answers"), value.get("length"), value.get("all_classes") or []
    if not _is_texts(answers) or not answers:
        raise DataError(f"{where}: 'answers' must be a list of texts.")
    if not _is_texts(classes):
        raise DataError(f"{where}: 'all_classes' must be a list of texts or null.")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise DataError(f"{where}: 'length' must be a whole number or null.")
    return tuple(answers), length, tuple(classes)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def rows_hash(rows: Sequence[LongBenchRow]) -> str:
    """Return a SHA-256 over rows, so that two results can be told to be on the same data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.question, row.context, row.answers, row.length, row.all_classes]).encode())
    return digest.hexdigest()


def references_hash(rows: Sequence[LongBenchRow]) -> str:
    """Return a SHA-256 over what answers are scored against, in any order; published answers hold no more."""
    scored = sorted(json.dumps([row.answers, row.length, row.all_classes]) for row in rows)
    return hashlib.sha256("\n".join(scored).encode()).hexdigest()
