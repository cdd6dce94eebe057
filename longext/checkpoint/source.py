"""Find a model: bundled name, local directory or Hub id; and read its config.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from longext import untrusted
from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.ranges import check_model_config
from longext.errors import CheckpointError
from longext.registry import did_you_mean

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_RESTORE = "Restore it from the original model."
_HUB_IGNORED = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "*.ot"]


def resolve_model(model: str, revision: str | None = None, *, weights: bool = True, pickles: bool = False) -> Path:
    """Return the local directory of `model`: a bundled name, a directory, or a Hub id (downloaded to its cache).

    Args:
        revision: branch, tag or commit of a Hub id.
        weights: False fetches only the small files of a Hub id.
        pickles: True fetches the *.bin files of a Hub id, but for whole models'.

    Raises:
        CheckpointError: nothing of that name; says what was looked for.
    """
    if model in BUNDLED_MODELS:
        return BUNDLED_MODELS[model]
    path = Path(model).expanduser()
    if path.is_dir():
        untrusted.check_directory(path)
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file. Give the directory that holds config.json, or a Hub id.")
    if not HUB_ID.match(model):
        raise CheckpointError(
            f"No model at '{model}': not a directory, a Hub id (owner/name) or a bundled model. "
            f"{did_you_mean(model, BUNDLED_MODELS)}"
        )
    ignored = _HUB_IGNORED if weights else [*_HUB_IGNORED, "*.safetensors"]
    if pickles:
        ignored = ["pytorch_model*.bin", *(pattern for pattern in ignored if pattern != "*.bin")]
    return _download(model, revision, ignored)


def _download(model: str, revision: str | None, ignored: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=ignored))
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{model}' is gated on the Hub: accept its terms there and run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"No directory and no Hub model called '{model}' (private ones need `hf auth login`)."
        ) from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"No directory '{model}' here, and the Hub cannot be reached for a model of that name. "
            "Give a local directory, or download it first with `hf download` where there is a connection."
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in `path`.

    A literal Infinity, which transformers 4 wrote, is there as transformers 5 spells it: {"__float__": "Infinity"}.

    Raises:
        CheckpointError: missing, unreadable or not an object; names the file and line.
    """
    options: dict[str, Any] = {"want": dict, "constant": untrusted.tagged_infinity}
    try:
        value: dict[str, Any] = untrusted.read_json(path, CheckpointError, advice=_RESTORE, **options)
    except FileNotFoundError as error:
        raise CheckpointError(f"No {path.name} in {path.parent}: not {what}.") from error
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """Return the model's config.json as a dict.

    Raises:
        CheckpointError: there is none, or a value in it that no model can have.
    """
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds an adapter, not a model. Merge it into its base model first.")
    config = read_json(directory / "config.json", "a Hugging Face model directory")
    check_model_config(config, directory / "config.json")
    return config


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a parsed config.json says of the text model: its `text_config`, or all of it."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def is_adapter(directory: Path) -> bool:
    """Return True for a directory that holds an adapter; the weights of its base may be there as well.

    transformers, too, puts an adapter into the model in its directory.
    """
    return (directory / "adapter_config.json").is_file()


def refuse_adapter(directory: Path) -> None:
    """Raise CheckpointError for an adapter directory: a model is wanted."""
    if is_adapter(directory):
        raise CheckpointError(f"{directory} holds an adapter, not a model. Merge it first: longext merge {directory}")
