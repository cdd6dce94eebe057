"""The files of a checkpoint besides its weights: which of them travel, how they are placed, who wrote to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longext.checkpoint.source import read_json
from longext.checkpoint.weights import INDEX_NAME
from longext.errors import LongextError
from longext.manifest import write_text

TEMPLATES = "additional_chat_templates"  # a folder of transformers: one file for each named chat template
# Small files that travel with a checkpoint; config.json is rewritten, the weights are linked. params.json, which says
# the RoPE in Mistral's own format, stays behind: it would be the old one.
_SIDE_PATTERNS = (
    *(f"{TEMPLATES}/*.jinja", "*.json", "*.jsonl", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_NOT_COPIED = {"config.json", "run.json", "trainer_state.json", "adapter_config.json", "params.json", INDEX_NAME}
_LEGACY_INDEX = ".bin.index.json"
# What an adapter's directory may hold of a tokenizer; its other files describe the training.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", f"{TEMPLATES}/*.jinja", "generation_config.json"),
)
_FICLONE = 0x40049409  # Linux ioctl: share the blocks of one file with another (btrfs, xfs)
_NUM_SAMPLES, _SAMPLE = 64, 4096


# --- which travel -----------------------------------------------------------------------------------------------------


def side_files(source: Path) -> tuple[Path, ...]:
    """Return the small files that travel with the checkpoint in `source`: tokenizer, generation config, license."""
    return tuple(file for file in _side_files(source) if belongs_to(file, source))


def _side_files(source: Path) -> list[Path]:
    files = {file for pattern in _SIDE_PATTERNS for file in source.glob(pattern) if file.is_file()}
    return sorted(file for file in files if file.name not in _NOT_COPIED and not file.name.endswith(_LEGACY_INDEX))


def left_out(source: Path) -> list[str]:
    """Return a line on the small files in `source` that do not travel, as they are links out of it."""
    return left_out_note(_side_files(source), source)


def tokenizer_files(adapter: Path) -> list[Path]:
    """Return the files of an adapter directory that belong to a tokenizer (or to generation)."""
    return [file for pattern in TOKENIZER_FILES for file in adapter.glob(pattern) if file.is_file()]


def belongs_to(file: Path, directory: Path) -> bool:
    """Return False for a link out of `directory`: people upload what is copied, and it may hold anything.

    Links of a Hub cache (snapshots/COMMIT/NAME) go to blobs/ of the same repository, and belong to it.
    """
    target, inside = file.resolve(), directory.resolve()
    blobs = inside.parent.parent / "blobs"
    return inside in target.parents or (inside.parent.name == "snapshots" and blobs == target.parent)


def left_out_note(files: Iterable[Path], directory: Path) -> list[str]:
    """Return one line that names those of the files that are links out of `directory`, none if there are none."""
    links = sorted(f"{file.name} -> {file.readlink()}" for file in files if not belongs_to(file, directory))
    if not links:
        return []
    return [f"Left out, as links out of {directory}: {', '.join(links)}. Put the files there to have them copied."]


# --- placing and writing ----------------------------------------------------------------------------------------------


def place_file(source: Path, target: Path, force_copy: bool = False) -> None:
    """Hard-link `source` as `target`; across devices, or with `force_copy`, clone its blocks or copy; no symlink."""
    source = source.resolve()  # Hub caches hold symlinks to blobs
    if not force_copy:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    if not _clone(source, target):
        shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> bool:
    """Copy-on-write clone if the filesystem offers it (Linux FICLONE); False if it does not."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def side_name(file: Path) -> str:
    """Return the name of a side file within its checkpoint."""
    return f"{TEMPLATES}/{file.name}" if file.parent.name == TEMPLATES else file.name


def place_side_file(file: Path, directory: Path, force_copy: bool = True) -> None:
    """Place a side file under its name within a checkpoint, as `place_file` does."""
    target = directory / side_name(file)
    target.parent.mkdir(exist_ok=True)
    place_file(file, target, force_copy)


def raise_lengths(directory: Path, length: int) -> None:
    """Raise the limits in other files than config.json, so that nothing stops at the old length; never lower them."""
    for name, key in (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length")):
        config = read_json(directory / name, "a JSON file") if (directory / name).is_file() else {}
        if isinstance(config.get(key), (int, float)) and config[key] < length:
            write_json(directory / name, {**config, key: length})


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON into a file of its own, never through a link to another model's."""
    path.unlink(missing_ok=True)
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(path, text + "\n")
    except (TypeError, ValueError) as error:
        raise LongextError(f"Cannot write {path.name}: {error}") from error


# --- who wrote to them ------------------------------------------------------------------------------------------------


def mark_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return by name what tells cheaply if a file was written to: size, time (ns), a hash of 64 samples of 4 kB."""
    return {path.name: _mark(path) for path in paths}


def _mark(path: Path) -> dict[str, Any]:
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(_NUM_SAMPLES):
            file.seek(max(0, status.st_size - _SAMPLE) * i // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": digest.hexdigest()[:16]}


def find_change(paths: Iterable[Path], marks: dict[str, dict[str, Any]]) -> str | None:
    """Return what was written to since `mark_files`, and how that shows; None if nothing was.

    Copies have times of their own: the time counts for a file with several names (hard links).
    """
    for path in paths:
        then, now = marks.get(path.name), _mark(path)
        if then is None:
            continue
        keys = ["size", "sample", *(["mtime_ns"] if path.stat().st_nlink > 1 else [])]
        changed = next((key for key in keys if then.get(key) != now[key]), None)
        if changed is not None:
            what = {"size": "its size", "sample": "its content", "mtime_ns": "its time of change"}[changed]
            shared = ", and with it the model whose file it is (a hard link)" if path.stat().st_nlink > 1 else ""
            return f"{path.name} was written to since `extend`: {what} differs{shared}"
    return None
