"""Sizes and SHA-256 of a directory's files: written last, looked at before the files are trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHUNK = 1 << 22


def sum_files(directory: Path, *, leave_out: str) -> dict[str, dict[str, Any]]:
    """Return {path: {"size", "sha256"}} of every file below `directory` but the one named `leave_out`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != leave_out)
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read once from beginning to end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def find_damage(directory: Path, sums: Mapping[str, Mapping[str, Any]], *, contents: bool = True) -> str | None:
    """Return what is wrong with the first file that differs from `sums`, or None if all are as they were.

    Args:
        contents: hash the files; without it their presence and size are looked at alone.
    """
    for name, expected in sums.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        if contents and sha256_of(path) != expected["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None
