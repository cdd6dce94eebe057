"""`longext` and `python -m longext`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from longext.cli import app
from longext.processes.launcher import follow_launcher

_PACKAGE = Path(__file__).parent
_usual = warnings.showwarning


def _show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """Print a warning of longext's own as a note of one line; Python's form names a line of our code."""
    if _PACKAGE in Path(filename).parents:
        print(f"longext: note: {message}", file=sys.stderr)
    else:
        _usual(message, category, filename, lineno, file, line)


def main() -> None:
    """Run the command line."""
    warnings.showwarning = _show
    follow_launcher()
    app(prog_name="longext")


if __name__ == "__main__":
    main()
