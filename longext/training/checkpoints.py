"""Checkpoints of a run: complete or not there, the last k kept, and only for the run that made them.

A checkpoint counts once `complete.json` is in it, written last. It holds the fingerprint of the run: everything that
decides which numbers come next. Resuming with another fingerprint is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from longext.errors import ConfigError
from longext.untrusted import read_json

MARKER = "complete.json"
_PREFIX = "checkpoint-"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest step first."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if (path / MARKER).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def mark_complete(checkpoint: Path, fingerprint: dict[str, Any]) -> None:
    """Write the marker: the checkpoint's files are on the disk before it is."""
    for path in [*checkpoint.rglob("*"), checkpoint]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    partial = checkpoint / f"{MARKER}.partial"
    partial.write_text(json.dumps(fingerprint, indent=2, default=str), encoding="utf-8")
    partial.replace(checkpoint / MARKER)


def keep_last(directory: Path, count: int) -> None:
    """Delete all complete checkpoints but the last `count`."""
    for old in complete_checkpoints(directory)[:-count]:
        shutil.rmtree(old, ignore_errors=True)


def drop_incomplete(directory: Path) -> None:
    """Delete checkpoints whose writing was interrupted."""
    for path in directory.glob(f"{_PREFIX}*"):
        if not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)


def check_fingerprint(checkpoint: Path, fingerprint: dict[str, Any]) -> None:
    """Raise ConfigError, naming the first difference, where `checkpoint` belongs to another run."""
    then = read_json(checkpoint / MARKER, ConfigError, want=dict, advice="Remove this checkpoint.")
    now = json.loads(json.dumps(fingerprint, default=str))
    for key in [*then, *(key for key in now if key not in then)]:
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"{checkpoint} was made with {key} {then.get(key)}, this run has {now.get(key)}: they would not "
                "continue one another. Use the same settings, or another -o for a new run."
            )
