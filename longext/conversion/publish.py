"""A checkpoint as it is published: which of its files, without paths of this machine, under its own name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from longext.checkpoint.source import read_config, refuse_adapter
from longext.checkpoint.weights import read_shards, weight_index
from longext.conversion.card import LINKS, base_name, paths_of, without_folders
from longext.conversion.files import TEMPLATES, TOKENIZER_FILES, belongs_to, side_name
from longext.errors import CheckpointError, ConfigError
from longext.manifest import MANIFEST_NAME, RECIPE_NAME, read_manifest
from longext.untrusted import read_text

CARD_NAME = "README.md"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}")
# besides the weights: what transformers or a reader takes from a checkpoint
_PARTS = (
    *TOKENIZER_FILES,
    *("config.json", "*preprocessor_config.json", "processor_config.json", "tekken.json"),
    *(CARD_NAME, "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes", MANIFEST_NAME, RECIPE_NAME),
)
_TEXTS = (MANIFEST_NAME, RECIPE_NAME)  # hold paths of this machine


@dataclass(frozen=True)
class Parcel:
    """What is uploaded.

    Attributes:
        files: name -> the file.
        texts: name -> what is uploaded in place of that file.
        left_out: names of what is there and no part of a checkpoint.
    """

    files: Mapping[str, Path]
    texts: Mapping[str, str]
    left_out: tuple[str, ...]

    def size(self, name: str) -> int:
        """Return the bytes that a name takes."""
        return len(self.texts[name].encode()) if name in self.texts else self.files[name].stat().st_size


def pack(directory: Path, repo: str, leave_out: bool = False) -> Parcel:
    """Return the files of the checkpoint in `directory`, and its card and records as `repo` shows them.

    Paths of this machine become names, and DIR becomes `repo`.

    Args:
        leave_out: leave files that are no part of a checkpoint, instead of refusing them.

    Raises:
        CheckpointError: no complete checkpoint; an adapter.
        ConfigError: `repo` is no name of a repository; files that are no part of a checkpoint, or links out of it.
    """
    if not REPO_ID.fullmatch(repo):
        raise ConfigError(f"REPO must be OWNER/NAME, as the Hub spells a repository, got '{repo}'.")
    refuse_adapter(directory)
    config = read_config(directory)
    index = weight_index(directory)
    shards = {path.name for path in (*(shard.path for shard in read_shards(directory)), *([index] if index else []))}
    has_code = "auto_map" in config
    found = sorted(file for file in directory.iterdir() if file.name != TEMPLATES)
    every = (*found, *sorted(directory.glob(f"{TEMPLATES}/*")))
    files = {side_name(file): file for file in every if _is_part(file, directory, shards, has_code)}
    others = tuple(f"{file.name}/" if file.is_dir() else file.name for file in found if file.name not in files)
    if others and not leave_out:
        raise ConfigError(
            f"{directory} holds what is no part of a checkpoint: {', '.join(others)}. Move it away, or add --leave-out."
        )
    if CARD_NAME not in files:
        raise CheckpointError(f"{directory} has no {CARD_NAME}. Write one, so that readers know what it is.")
    manifest = read_manifest(directory)
    paths = {*_paths(manifest), *paths_of(str(manifest.get("command", "")))}
    texts = {name: without_folders(_text(files[name]), paths) for name in _TEXTS if name in files}
    card = without_folders(_text(files[CARD_NAME]).replace(LINKS, ""), paths)
    card = re.sub(r"(?<=`)python convert[^`|]*", _downloaded, card)
    return Parcel(files, {**texts, CARD_NAME: re.sub(r"\bDIR\b", repo, card)}, others)


def _downloaded(command: re.Match[str]) -> str:
    """Return the command of a converter, which reads a folder and no Hub id."""
    return "hf download DIR --local-dir HF && " + re.sub(r"\bDIR\b", "HF", command[0])


def _is_part(file: Path, directory: Path, shards: set[str], has_code: bool) -> bool:
    if not file.is_file() or not belongs_to(file, directory):
        return False
    is_code = has_code and file.suffix == ".py"
    return file.name in shards or is_code or any(fnmatch(side_name(file), pattern) for pattern in _PARTS)


def _text(file: Path) -> str:
    return read_text(file, CheckpointError)


def _paths(value: Any) -> Iterator[str]:
    """Yield the absolute paths in a record."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str) and Path(value).is_absolute():
        yield value


def base_of(directory: Path) -> str | None:
    """Return the base model that run.json names, as a card calls it; None if it names none."""
    extension = read_manifest(directory).get("extension") or {}
    name = extension.get("base_model")
    return base_name(str(name)) if name else None


def config_hash(directory: Path) -> str:
    """Return the SHA-256 of config.json as results of evaluations record it."""
    return hashlib.sha256(json.dumps(read_config(directory), sort_keys=True).encode()).hexdigest()
