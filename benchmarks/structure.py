"""The shape of the package: how many files, how long, how entangled; and how much of it a command enters.

    python benchmarks/structure.py [PACKAGE ...]          # the table of docs/design.md, one column per package
    python benchmarks/structure.py --tree                 # its folders and modules, there too
    python benchmarks/structure.py --entered eval ppl books-5m --lengths 256 --stride 128 --max-tokens 512

PACKAGE is a folder `longext`, for example that of another commit. Standard library only.
"""

from __future__ import annotations

import ast
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "longext"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FIELDS = {"option", "setting", "override"}  # of longext.settings: a field that is a flag, a recipe key, or both


def code_lines(tree: ast.Module, lines: list[str]) -> int:
    """Return how many lines are neither blank, nor a comment, nor part of a docstring."""
    docs: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    texts = [line.strip() for number, line in enumerate(lines, 1) if number not in docs]
    return sum(bool(text) and not text.startswith("#") for text in texts)


def imports(tree: ast.Module, known: set[str]) -> tuple[set[str], int]:
    """Return which modules of longext a file imports, type checkers aside, and how many imports are in functions."""
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for check in checks for inner in ast.walk(check)}
    targets, deferred, top = set(), 0, set(map(id, tree.body))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names if alias.name.split(".")[0] == "longext"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "longext":
            targets |= ({f"{node.module}.{alias.name}" for alias in node.names} & known) or {node.module}
            deferred += id(node) not in top
    return targets, deferred


def cycles(graph: dict[str, set[str]]) -> list[int]:
    """Return the sizes of the groups of modules that import each other in a circle."""
    reached = {name: targets & graph.keys() for name, targets in graph.items()}
    for _ in range(len(graph).bit_length()):  # each round doubles the distance
        reached = {name: near.union(*(reached[target] for target in near)) for name, near in reached.items()}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(len(group) for group in groups if group)


def declarations(nodes: list[ast.AST]) -> str:
    """Count how options are declared: as parameters of commands / with Typer's own calls / as fields of settings."""
    calls = Counter(ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call))
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    commands = [node for node in functions if any("command(" in ast.unparse(item) for item in node.decorator_list)]
    parameters = sum(len(node.args.args) + len(node.args.kwonlyargs) for node in commands)
    return f"{parameters} / {calls['typer.Option'] + calls['typer.Argument']} / {sum(calls[name] for name in FIELDS)}"


def measure(package: Path) -> dict[str, str]:
    """Return the measures of `package` by name."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    names = {path: ".".join(("longext", *path.relative_to(package).with_suffix("").parts)) for path in texts}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    found = {names[path]: imports(tree, set(names.values())) for path, tree in trees.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    sizes = sorted(node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, FUNCTIONS))
    code, folders = 0, Counter()
    for path, text in texts.items():
        code += code_lines(trees[path], text.splitlines())
        folders[path.relative_to(package).parts[0] if path.parent != package else "(top)"] += len(text.splitlines())
    return {
        "files / lines": f"{len(texts)} / {folders.total():,}",
        "code lines (no blanks, comments, docstrings)": f"{code:,}",
        "functions / median / p90": f"{len(sizes):,} / {statistics.median(sizes):g} / {sizes[int(0.9 * len(sizes))]}",
        "functions over 60 lines / longest": f"{sum(size > 60 for size in sizes)} / {sizes[-1]}",
        "import edges per file": f"{sum(len(targets) for targets, _ in found.values()) / len(texts):.2f}",
        "imports deferred into functions": f"{sum(count for _, count in found.values())}",
        "cycles, deferred imports included": ", ".join(
            f"{size} files" for size in cycles({name: to for name, (to, _) in found.items()})
        )
        or "none",
        "options as parameters of commands / Typer's / fields": declarations(nodes),
        "files that name babilong": f"{sum('babilong' in text.lower() for text in texts.values())}",
        **{f"lines of {folder}": f"{count:,}" for folder, count in sorted(folders.items())},
    }


def entered(command: list[str]) -> None:
    """Run a command in this process and print how many files and functions of the package it enters."""
    functions = set()

    def note(frame, event, _) -> None:
        code = frame.f_code
        is_function = code.co_flags & 1  # CO_OPTIMIZED: bodies of modules and classes, which an import runs, lack it
        if event == "call" and is_function and code.co_filename.startswith(str(PACKAGE)):
            functions.add((code.co_filename, code.co_firstlineno))

    sys.path.insert(0, str(PACKAGE.parent))
    from longext.cli import app

    sys.setprofile(note)
    try:
        app(command, prog_name="longext")
    finally:
        sys.setprofile(None)
        print(f"{len({file for file, _ in functions})} files, {len(functions)} functions", file=sys.stderr)


def tree() -> str:
    """Return the package as folders and modules, each with the first line of its docstring."""
    lines = []
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        name = folder.relative_to(PACKAGE.parent).as_posix()
        lines.append(f"{name}/".ljust(22) + f" {summary(folder / '__init__.py')}")
        for path in sorted(folder.glob("*.py")):
            if path.stem != "__init__":
                lines.append(f"  {path.name:20} {summary(path)}")
    return "\n".join(lines) + "\n"


def summary(path: Path) -> str:
    """Return the first line of a module's docstring, shortened to 95 characters."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return textwrap.shorten(text.partition("\n")[0], 95, placeholder=" ...")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments == ["--tree"]:
        sys.exit(print(tree(), end=""))
    if arguments[:1] == ["--entered"]:
        sys.exit(entered(arguments[1:]))
    columns = [measure(Path(argument)) for argument in arguments or [PACKAGE]]
    print(f"| | {' | '.join(arguments)} |\n|:--|{'--:|' * len(columns)}")
    for row in dict.fromkeys(name for column in columns for name in column):
        print(f"| {row} | {' | '.join(column.get(row, '-') for column in columns)} |")
