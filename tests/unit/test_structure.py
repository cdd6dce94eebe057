"""The architecture, held by tests: layers, cheap imports, small files and functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import longext

PACKAGE = Path(longext.__file__).parent
RANK = {
    "errors": 0,
    "registry": 1,
    "signals": 1,
    "untrusted": 1,
    "checksums": 1,
    "config": 1,
    "staging": 2,
    "manifest": 2,
    "rope": 3,
    "attention": 3,
    "checkpoint": 4,
    "models": 4,
    "data": 5,
    "evaluation": 6,
    "training": 7,
    "planning": 7,
    "compressor": 8,
    "reporting": 9,
    "cli": 10,
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_point_down_only():
    for path in modules():
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longext."):
                there = node.module.split(".")[1]
                assert RANK[there] <= RANK[here], f"{path.name}: {here} may not import {there}"


def test_no_module_is_named_like_a_public_function():
    names = {path.stem for path in modules()}
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
                assert node.end_lineno - node.body[0].lineno < 60, f"{path.name}:{node.name}"


def test_public_functions_have_docstrings():
    for path in modules():
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(member for owner in classes for member in owner.body)]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}:{node.name}"


def test_models_come_in_through_one_door():
    """Only models/load.py loads a config, tokenizer or model; _reload.py and _built.py do for a clean process."""
    allowed = ("models/load.py", "checkpoint/_reload.py", "checkpoint/_built.py")
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
        "from longext.config import ExtendConfig\n"
        "from longext.checkpoint.extend import extend_checkpoint\n"
        f"output = {str(tmp_path / 'o')!r}\n"
        "extend_checkpoint(ExtendConfig(model='books-5m', method='yarn', factor=8.0, output=output, check=False))\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
