"""Write a directory that appears under its final name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from longext.errors import ConfigError
from longext.manifest import read_manifest


def check_output(output: Path, force: bool, *, protected: Path | None = None) -> None:
    """Raise ConfigError where writing `output` would lose something.

    Args:
        output: the directory to be written.
        force: the user allows an existing directory to be replaced.
        protected: a directory that must survive (the source model).
    """
    if protected is not None:
        source, target = protected.resolve(), output.resolve()
        if source == target or target in source.parents or source in target.parents:
            raise ConfigError(f"The output {output} and the model {protected} overlap. Choose another -o directory.")
    if output.is_file():
        raise ConfigError(f"The output {output} is a file. Choose a directory with -o.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"Cannot write {output}: {parent} is not a writable directory. Choose another -o.")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise ConfigError(f"The output {output} already exists. Choose another -o, or add --force to replace it.")
        if not is_ours(output):
            raise ConfigError(
                f"The output {output} exists and was not written by longext, so --force will not delete it. "
                "Choose another -o, or remove it yourself."
            )


def is_ours(directory: Path) -> bool:
    """Return True for a directory that a longext command wrote (it holds longext's run.json)."""
    return bool(read_manifest(directory))


@contextlib.contextmanager
def staged_directory(output: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `output`; rename it to `output` on success, remove it on any failure or Ctrl-C.

    Args:
        output: the final name. It must not exist, unless `force` and longext wrote it.

    Raises:
        ConfigError: `output` exists and may not be replaced.
    """
    check_output(output, force)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        staging.chmod(0o755)  # mkdtemp makes it private; a result is as readable as any directory
        yield staging
        _replace(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def replace_directory(finished: Path, output: Path, force: bool) -> None:
    """Give a finished directory (of a long run, that could not be a temporary one) its final name.

    Raises:
        ConfigError: `output` exists and may not be replaced.
    """
    check_output(output, force)
    _replace(finished, output)


def _replace(staging: Path, output: Path) -> None:
    """Move `staging` to `output`; an old `output` is set aside first and deleted only when the new one stands."""
    if not output.exists():
        staging.rename(output)
        return
    aside = staging.with_name(f".{output.name}.old-{os.getpid()}")
    output.rename(aside)
    try:
        staging.rename(output)
    except BaseException:
        aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)
