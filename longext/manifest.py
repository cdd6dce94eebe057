"""`run.json` and `recipe.yaml`: what every output holds so that it can be understood and repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import longext
from longext.errors import CheckpointError
from longext.settings import to_recipe
from longext.untrusted import fields, read_json, spelled

MANIFEST_NAME = "run.json"
RECIPE_NAME = "recipe.yaml"
SCHEMA = "longext.run/1"
RESULT_SCHEMA = "longext.result/1"
_ADVICE = "Restore the file, or remove it: the model is then read without its history."
_PARTS = ("config", "extension", "merge", "finetune")
_EXTENSION = {
    "rope_parameters": dict,
    **dict.fromkeys(("base_model", "base_path"), str),
    **dict.fromkeys(("base_revision", "base_weights", "relation", "formula"), (str, None)),
    **dict.fromkeys(("old_length", "new_length"), (int, None)),
    **{"origin": (dict, None), "spec": (dict, None), "old_rope_parameters": (dict, None), "trained": (bool, None)},
}
_MERGE = {"files": dict, "touched": list, "proof": (dict, None)}
_REPORTED = ("torch", "transformers", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python, longext and the libraries that numbers depend on (none is imported)."""
    return {"python": platform.python_version(), "longext": longext.__version__, **_installed()}


@functools.cache
def _installed() -> dict[str, str]:
    installed = {}
    for name in _REPORTED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


_typed: list[Sequence[str]] = []  # the command lines that are run in this process, the innermost last


@contextlib.contextmanager
def typed(arguments: Sequence[str]) -> Iterator[None]:
    """Let records name this command line while it runs."""
    _typed.append(arguments)
    try:
        yield
    finally:
        _typed.pop()


def command_line() -> str:
    """Return the command as the user typed it, its first word shortened to `longext`, or that Python called."""
    return spelled(shlex.join(["longext", *_typed[-1]])) if _typed else "(called from Python)"


def result_record(kind: str, model: Any = None, protocol: Any = None, data: Any = None, **body: Any) -> dict[str, Any]:
    """Return the JSON record of one result: schema, kind, how it was made, model, protocol, data, then `body`.

    Args:
        model: what a `LanguageModel` says of itself, or the name of the model that a command is about.
        protocol: how it was measured, None for what measures nothing.
        data: what it was measured on.
    """
    return {
        "schema": RESULT_SCHEMA,
        "kind": kind,
        "command": command_line(),
        "versions": versions(),
        "model": model,
        "protocol": protocol,
        "data": data,
        **body,
    }


def write_manifest(directory: Path, command: str, config: Any, **extra: Any) -> None:
    """Write run.json (command, resolved config, versions, `extra`) and recipe.yaml, which makes the output again."""
    manifest = {
        "schema": SCHEMA,
        "command": command_line(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "config": dataclasses.asdict(config),
        **extra,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    write_text(directory / MANIFEST_NAME, text + "\n")
    write_text(directory / RECIPE_NAME, f"# longext {command} -c {RECIPE_NAME}\n{to_recipe(config)}")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8; the bytes of a file name that is none stay readable (in JSON as the escapes they are)."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the run.json in `directory`, or an empty dict if there is none that longext wrote.

    Raises:
        CheckpointError: it has longext's schema, and a value in it is of another type than longext writes.
    """
    path = directory / MANIFEST_NAME
    try:
        value = read_json(path, CheckpointError, keep_surrogates=True, constant=float)
    except (OSError, CheckpointError):
        return {}
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return {}
    fields(value, str(path), dict.fromkeys(_PARTS, (dict, None)), CheckpointError, _ADVICE)
    if value.get("extension"):
        fields(value["extension"], f"{path}: extension", _EXTENSION, CheckpointError, _ADVICE)
    if value.get("merge"):
        fields(value["merge"], f"{path}: merge", _MERGE, CheckpointError, _ADVICE)
    manifest: dict[str, Any] = value
    return manifest
