"""Runs that answer many prompts: what happens to the answers of a run that ends early."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from longext.errors import LongextError


@contextlib.contextmanager
def kept_answers(path: Path | None) -> Iterator[None]:
    """Remove the answers at `path` once their results are written; where the run ends before, say how it goes on."""
    from longext.reporting.console import stderr

    try:
        yield
    except LongextError:  # its message says what to do
        raise
    except BaseException:
        if path is not None and path.is_file():
            if len(path.read_bytes().splitlines()) > 1:  # more than a header
                stderr().print(f"The answers so far are in {path}: the same command goes on from them.", markup=False)
            else:
                path.unlink()
        raise
    if path is not None:
        path.unlink(missing_ok=True)
