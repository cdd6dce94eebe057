"""The tree of the package in docs/design.md, made of the first sentences of its modules.

    python docs/tree.py            print it
    python docs/tree.py --write    put it into docs/design.md

A test compares the page with it. Folders that a registry reads are listed by name: `--help` says what their files are.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "longext"
PAGE = DOCS / "design.md"
BEGIN, END = "```tree\n", "```\n"
WIDTH = 118


def summary(file: Path) -> str:
    """Return the first paragraph of a module's docstring."""
    return " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())


def is_registry(folder: Path) -> bool:
    """Return whether every file of a folder is an entry of a registry."""
    return (
        folder.name in ("methods", "variants", "architectures", "suites", "commands") and folder.parent.name != "report"
    )


def tree(folder: Path = PACKAGE, indent: str = "") -> list[str]:
    """Return the lines of a folder: what it is for, its files, then its folders."""
    lines = entry(f"{indent}{folder.name}/", summary(folder / "__init__.py"))
    indent += "  "
    files = sorted(file for file in folder.glob("*.py") if file.stem != "__init__")
    if is_registry(folder):
        lines += textwrap.wrap(
            " ".join(file.stem for file in files), WIDTH, initial_indent=indent, subsequent_indent=indent
        )
        files = []
    for file in files:
        lines += entry(f"{indent}{file.name}", summary(file))
    for inner in sorted(file.parent for file in folder.glob("*/__init__.py")):
        lines += tree(inner, indent)
    return lines


def entry(name: str, text: str) -> list[str]:
    """Return a name and its text in the column behind it, wrapped."""
    first = f"{name:<23} "
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * 24) or [name]


def written_tree() -> str:
    """Return the tree that the page holds."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    text = "\n".join(tree()) + "\n"
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(written_tree(), text), encoding="utf-8")
    else:
        print(text, end="")
