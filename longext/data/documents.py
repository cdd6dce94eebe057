"""Document sources: the bundled sample, text files, folders, JSON lines, parquet and Hub datasets."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.checkpoint.source import HUB_ID
from longext.checksums import sha256_of
from longext.errors import DataError
from longext.extras import require
from longext.options import DataConfig
from longext.untrusted import json_lines, note, open_file, read_json, read_text, spelled, type_name

SAMPLE = "sample"
_SPLITS = frozenset({"train", "validation", "valid", "dev", "test"})


@dataclass(frozen=True)
class Document:
    """One text and the name it has in its source."""

    id: str
    text: str


@dataclass(frozen=True)
class Row:
    """One entry of a source before it is known what it means.

    Attributes:
        id: its name in results: file and line, or Hub id and number.
        where: its place as an error names it.
        value: what the file holds there.
    """

    id: str
    where: str
    value: Any


def load_documents(config: DataConfig) -> list[Document]:
    """Return the documents of `config.data`, at most `config.max_documents` of them, in a fixed order.

    Raises:
        DataError: no such source, an unreadable file (with its line), or no text in it.
    """
    documents = [document for document in iterate_documents(config) if document.text.strip()]
    if not documents:
        raise DataError(f"No text in {config.data}.")
    return documents


def iterate_documents(config: DataConfig) -> Iterator[Document]:
    """Yield what `load_documents` returns one at a time, empty documents included (they count as documents).

    Raises:
        DataError: as `load_documents`, when the document at fault is reached.
    """
    return (_row_document(row, config) for row in iterate_rows(config))


def iterate_rows(config: DataConfig) -> Iterator[Row]:
    """Yield the entries of `config.data` uninterpreted; a text file is one entry with its text under `text_field`.

    Raises:
        DataError: no such source, or an unreadable file (with its line), when it is reached.
    """
    return itertools.islice(_open_source(config), config.max_documents)


def source_identity(config: DataConfig) -> dict[str, Any]:
    """Return what tells two sources apart: names and SHA-256 of local files, or a Hub id, split and commit.

    `commit` is None if the Hub cannot be reached.

    Raises:
        DataError: no such source, or no readable file in it.
    """
    files = _source_files(config)
    if files is not None:
        return {"files": [[spelled(file.name), sha256_of(file)] for file in files]}
    return {"hub": config.data, "split": config.split, "commit": _hub_commit(config.data)}


def data_hash(documents: Iterable[Document]) -> str:
    """Return a SHA-256 over ids and texts, so that two results can be known to be on the same data."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.id.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()


def documents_facts(config: DataConfig, texts: Iterable[Document], /, **more: Any) -> dict[str, Any]:
    """Return what a record says of documents, and of how they were read."""
    facts = {"source": config.data, "split": config.split, "sha256": data_hash(texts)}
    return {**facts, **more, "max_tokens": config.max_tokens}


def _open_source(config: DataConfig) -> Iterator[Row]:
    files = _source_files(config)
    if files is None:
        yield from _read_hub(config)
    for file in files or ():
        yield from _reader_of(file)(file, config)


def _source_files(config: DataConfig) -> list[Path] | None:
    """Return the local files of `config.data` in reading order, or None for a Hub id."""
    if config.data == SAMPLE:
        return [SAMPLE_DOCUMENT]
    path = Path(config.data).expanduser()
    if config.data and path.is_dir():
        return _folder_files(path, config)
    if path.exists() or path.is_symlink():
        _reader_of(path)
        return [_readable(path)]
    if HUB_ID.match(config.data):
        return None
    raise DataError(
        f"No data at '{config.data}': not a file, a folder, a Hub dataset id (owner/name) or '{SAMPLE}' (bundled)."
    )


def _reader_of(path: Path) -> Callable[[Path, DataConfig], Iterator[Row]]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"Cannot read {path}: known kinds are {', '.join(sorted(_READERS))}, and folders of them.")
    return reader


def _readable(path: Path) -> Path:
    """Return `path` if it can be opened and is a file (DataError if not): a hole in the data is no detail."""
    try:
        open_file(path).close()
    except FileNotFoundError as error:
        raise DataError(f"{path} is a link to a file that is not there. Remove it, or fetch the file.") from error
    return path


def _folder_files(folder: Path, config: DataConfig) -> list[Path]:
    """Return the data files in a folder; hidden files and folders (.git, .ipynb_checkpoints) hold none."""
    candidates = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in _READERS and not file.is_dir())
    visible = (file for file in candidates if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    files = [_readable(file) for file in visible if file.stem.upper() != "README"]
    if not files:
        raise DataError(f"No {', '.join(sorted(_READERS))} files in the folder {folder}.")
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    named = sorted({split for split in splits.values() if split})
    if named and config.split not in named:
        note(f"{folder} names the split {', '.join(named)}, not '{config.split}' (--split): all its files were read.")
    elif len(set(splits.values())) > 1 and named:
        unnamed = [file for file in files if splits[file] is None]
        files = [file for file in files if splits[file] == config.split]  # a downloaded dataset: one split of it
        if unnamed:
            note(
                f"{folder} was read as a dataset with splits: {len(files)} file(s) of '{config.split}'. Left out are "
                f"{len(unnamed)} that name no split, as {unnamed[0].relative_to(folder)}; rename what is no split."
            )
    return files


def _hub_commit(name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception:  # offline or unreachable, in many kinds; reading the data says so if it must be read
        return None


def _split_of(path: Path) -> str | None:
    """Return the dataset split a relative path names (`test/a.txt`, `data/test-00000-of-00001.parquet`), or None."""
    names = [*path.parts[:-1], re.split(r"[-_.]", path.stem)[0]]
    return next((name for name in names if name in _SPLITS), None)


def _read_text(path: Path, config: DataConfig) -> Iterator[Row]:
    yield Row(spelled(path.name), str(path), {config.text_field: read_text(path)})


def _read_jsonl(path: Path, _: DataConfig) -> Iterator[Row]:
    for where, row in json_lines(path, form="{}, line {}", constant=float):
        yield Row(f"{spelled(path.name)}:{where.rpartition(' ')[2]}", where, row)


def _read_json(path: Path, _: DataConfig) -> Iterator[Row]:
    rows = read_json(path, limit=None, constant=float, advice="If each line is a row, call the file .jsonl.")
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield Row(f"{spelled(path.name)}:{number}", f"{path}, entry {number}", row)


def _read_parquet(path: Path, _: DataConfig) -> Iterator[Row]:
    require("Reading parquet", ["train"], ["pyarrow"])
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield Row(f"{spelled(path.name)}:{number}", f"{path}, row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error}).") from error


def _row_document(row: Row, config: DataConfig) -> Document:
    value = row.value
    if not isinstance(value, dict) or not isinstance(value.get(config.text_field), str):
        keys = ", ".join(sorted(value))[:200] if isinstance(value, dict) else type_name(value)
        if isinstance(value, dict) and config.text_field in value:
            raise DataError(
                f"{row.where}: no text under '{config.text_field}', which holds {type_name(value[config.text_field])}. "
                "Leave the row out, or name another column with --text-field."
            )
        raise DataError(
            f"{row.where}: no text under '{config.text_field}' (found: {keys}). Name the column with --text-field."
        )
    name = value.get("id")
    return Document(str(name)[:200] if isinstance(name, (str, int)) and name else row.id, value[config.text_field])


def _read_hub(config: DataConfig) -> Iterator[Row]:
    """Stream a Hub dataset; script-only ones are read from the parquet copy the Hub keeps of them."""
    name = config.data
    try:
        for number, row in enumerate(_open_hub(name, config.split)):
            yield Row(f"{name}:{number}", f"{name}[{config.split}], row {number}", row)
    except (OSError, ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"No file '{name}' here, and the Hub dataset of that name cannot be read ({reason}). "
            f"Offline: fetch it with `hf download --repo-type dataset {name} --local-dir DIR` and give --data DIR."
        ) from error


def _open_hub(name: str, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split, streaming=True)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        return load_dataset(name, split=split, streaming=True, revision="refs/convert/parquet")


_READERS: dict[str, Callable[[Path, DataConfig], Iterator[Row]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
