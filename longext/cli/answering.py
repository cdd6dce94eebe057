"""Runs that answer many prompts: what happens to the answers of a run that ends early."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longext.errors import ConfigError, LongextError


@contextlib.contextmanager
def kept_answers(path: Path | None, output: Path, config: Any) -> Iterator[None]:
    """Remove the answers at `path` once their results are written; where the run ends before, say how it goes on.

    Args:
        path: file or folder of answers; None where none are kept.
        output: where the results go; `config.output` says whether the user named it.
    """
    from longext.models.answer_file import remove_answers

    if path is not None and (path.exists() or path.is_symlink()) and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path}, where the answers are kept, is no file or directory. Choose another -o.")
    try:
        yield
    except LongextError:  # its message says what to do
        raise
    except BaseException:
        if path is not None and not tell_how_to_go_on(path, output, config):
            remove_answers(path)
        raise
    if path is not None:
        remove_answers(path)


def tell_how_to_go_on(path: Path, output: Path, config: Any) -> bool:
    """Say on standard error where the answers are; return False where there are none."""
    from longext.models.answer_file import holds_answers
    from longext.report.console import say

    if not holds_answers(path):
        return False
    named = "" if config.output else f" with -o {output}"
    say(f"The answers so far are in {path}: the same command{named} goes on from them.", aside=True)
    return True
