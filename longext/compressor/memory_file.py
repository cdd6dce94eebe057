"""A session on disk: one safetensors file with its memory, its raw tokens, and which compressor can read it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from longext.compressor.base import Compressor
from longext.compressor.memory import Memory
from longext.errors import CheckpointError
from longext.staging import staged_file

SCHEMA = "longext.memory/1"
_KEY = "longext"


def write_memory(path: Path, memory: Memory, tokens: dict[str, list[int]], description: dict[str, Any]) -> None:
    """Write a memory file, complete or not at all.

    Args:
        tokens: lists of token ids by name.
        description: plain JSON values for the file's metadata.
    """
    from safetensors.torch import save_file

    tensors = {f"memory.{i}": tensor.detach().cpu().contiguous() for i, tensor in enumerate(memory)}
    tensors |= {name: torch.tensor(ids, dtype=torch.int64) for name, ids in tokens.items()}
    with staged_file(path) as unfinished:
        save_file(tensors, unfinished, {_KEY: json.dumps({"schema": SCHEMA, **description})})


def read_memory(path: Path) -> tuple[Memory, dict[str, list[int]], dict[str, Any]]:
    """Return what `write_memory` wrote.

    Raises:
        CheckpointError: no such file, or not a memory of this schema.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[_KEY])
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        assert description["schema"] == SCHEMA
    except FileNotFoundError as error:
        raise CheckpointError(f"No memory file {path}.") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{path} is not a memory that longext wrote (`longext generate --save-memory`), or it is damaged."
        ) from error
    count = sum(name.startswith("memory.") for name in names)
    memory = tuple(tensors[f"memory.{i}"] for i in range(count))
    tokens = {name: tensors[name].tolist() for name in names if not name.startswith("memory.")}
    return memory, tokens, description


def hash_weights(compressor: Compressor) -> str:
    """Return a hash of a compressor's own weights, as float32: the precision they are saved in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(compressor.state_dict().items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
