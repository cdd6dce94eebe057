"""The architecture, held by tests: layers, cheap imports, small files and functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import longext

PACKAGE = Path(longext.__file__).parent
LAYERS = (
    "errors concepts extras registry untrusted signals checksums settings manifest staging threads processes rope "
    "options attention checkpoint conversion models data training compressor planning evals searching doctor report "
    "api cli"
).split()
MOST_MODULES = 15


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    return ".".join(("longext", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports(path, known):
    """The modules of longext that a file imports, deferred imports included, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in checks for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "longext")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "longext":
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (full & known) or {node.module}


def import_graph():
    known = {module_name(path) for path in modules()}
    return {module_name(path): set(imports(path, known)) for path in modules()}


def layer(name):
    return name.split(".")[1]


def test_every_folder_has_a_layer():
    folders = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert folders - {"__init__", "__main__"} == set(LAYERS), "add it to LAYERS, below whatever imports it"


def test_imports_point_down_only():
    for name, targets in import_graph().items():
        if name in ("longext", "longext.__main__"):
            continue
        for target in targets - {"longext"}:
            above = LAYERS.index(layer(name)) - LAYERS.index(layer(target))
            assert above > 0 or layer(name) == layer(target), f"{name} may not import {target}"


def test_no_modules_import_each_other_in_a_circle():
    """Deferred imports count."""
    graph = import_graph()
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name == "longext":
            return
        path.append(name)
        for target in sorted(graph.get(name, ())):
            visit(target)
        done.add(path.pop())

    for name in graph:
        visit(name)


def test_folders_stay_small():
    """But for those that a registry reads: there a file is an entry, and nothing else names it."""
    entries = {PACKAGE / "cli" / "commands", PACKAGE / "evals" / "suites"}
    folders = {path.parent for path in modules()}
    for folder in folders - {PACKAGE} - entries:
        count = len([path for path in folder.glob("*.py") if path.stem != "__init__"])
        assert count <= MOST_MODULES, f"{folder.name}: {count} modules"


def test_no_module_is_named_like_a_public_function():
    names = {path.stem for path in PACKAGE.iterdir()}
    assert not names & set(longext._PUBLIC)


def test_every_public_name_resolves():
    for name in longext.__all__:
        assert getattr(longext, name) is not None


def test_functions_and_files_stay_small():
    for path in modules():
        text = path.read_text()
        assert len(text.splitlines()) <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{path.name}:{node.name}"


def test_public_functions_have_docstrings():
    for path in modules():
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(member for owner in classes for member in owner.body)]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}:{node.name}"


def test_models_come_in_through_one_door():
    """Only checkpoint/load.py loads a config, tokenizer or model; _reload.py and _built.py do for a clean process."""
    allowed = ("checkpoint/load.py", "conversion/_reload.py", "checkpoint/_built.py")
    for path in modules():
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        loads = [ast.unparse(call) for call in calls if getattr(call, "attr", "") == "from_pretrained"]
        own = [load for load in loads if "Peft" not in load]
        assert not own or path.relative_to(PACKAGE).as_posix() in allowed, own


def test_the_command_line_starts_without_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from longext.cli import app\n"
        "for args in (['--help'], ['extend', '--help'], ['eval', 'ppl', '--help']):\n"
        "    assert CliRunner().invoke(app, args).exit_code == 0, args\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_extend_without_its_check_runs_without_torch_or_transformers(tmp_path):
    code = (
        "import sys\n"
        "from longext.conversion.config import ExtendConfig\n"
        "from longext.conversion.extend import extend_checkpoint\n"
        f"output = {str(tmp_path / 'o')!r}\n"
        "extend_checkpoint(ExtendConfig(model='books-5m', method='yarn', factor=8.0, output=output, check=False))\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
