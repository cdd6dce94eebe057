"""The files that CONTRIBUTING.md shows: tests add them at run time, so that what it says is what works."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def added_file(path: str) -> str:
    """Return the file `path` that a diff of CONTRIBUTING.md adds."""
    text = PAGE.read_text(encoding="utf-8")
    block = re.search(rf"```diff\n--- /dev/null\n\+\+\+ b/{re.escape(path)}\n@@[^\n]*@@\n(.*?)```", text, re.DOTALL)
    assert block, f"CONTRIBUTING.md adds no {path}"
    lines = block[1].splitlines()
    assert all(line.startswith("+") for line in lines)
    assert len(lines) <= 40, f"{path} has {len(lines)} lines"
    return "\n".join(line[1:] for line in lines) + "\n"
