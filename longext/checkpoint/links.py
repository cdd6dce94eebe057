"""Files that are links: which of them belong to a model, and whether somebody wrote through one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_NUM_SAMPLES, _SAMPLE = 64, 4096


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
