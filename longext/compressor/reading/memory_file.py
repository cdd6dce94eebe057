"""A session on disk: one safetensors file with its memory, its raw tokens, and which compressor can read it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint.weights import is_float, read_header
from longext.compressor.base import Compressor
from longext.compressor.memory import Memory
from longext.errors import CheckpointError
from longext.staging import staged_file
from longext.untrusted import fields, parse_json

SCHEMA = "longext.memory/2"
TOKENS = ("sink", "before", "tail")  # lists of token ids that a session needs as text
_KEY = "longext"
_MOST_SEGMENTS = 2**18
_ADVICE = "It is damaged, or not a memory that longext wrote (`longext generate --save-memory`)."
_FIELDS = {
    **{"schema": str, "spec": dict, "ratios": list, "base_weights": str, "compressor": str},
    **{"num_segments": int, "num_tokens": int, "when_full": str, "first": int, "held": list},
}


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
    from safetensors import safe_open

    try:
        header = read_header(path, advice=_ADVICE)
    except FileNotFoundError as error:
        raise CheckpointError(f"No memory file {path}.") from error
    if _KEY not in header.metadata:
        raise CheckpointError(f"{path} has no description of longext. {_ADVICE}")
    where = f"{path}: {_KEY}"
    description = parse_json(header.metadata[_KEY], where, CheckpointError, want=dict, advice=_ADVICE)
    values = fields(description, where, _FIELDS, CheckpointError, _ADVICE)
    if values["schema"] != SCHEMA or not 0 <= values["num_segments"] <= _MOST_SEGMENTS or values["num_tokens"] < 0:
        raise CheckpointError(f"{where} does not say {SCHEMA}, or has counts that no session has. {_ADVICE}")
    numbers = [*values["ratios"], *values["held"]]
    if not values["ratios"] or not all(type(number) is int and number > 0 for number in numbers):
        raise CheckpointError(f"{where} must name ratios as whole numbers above 0. {_ADVICE}")
    count = sum(name.startswith("memory.") for name in header.tensors)
    expected = [*(f"memory.{i}" for i in range(count)), *TOKENS]
    for name in expected:
        dtype, shape = header.tensors.get(name, ("nothing", ()))[:2]
        if not ((dtype == "I64" and len(shape) == 1) if name in TOKENS else is_float(dtype)):
            wanted = "I64 in one row" if name in TOKENS else "floating-point numbers"
            raise CheckpointError(f"{path}: '{name}' must be {wanted}, found {dtype}. {_ADVICE}")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in expected}
    memory = tuple(tensors[f"memory.{i}"] for i in range(count))
    return memory, {name: tensors[name].tolist() for name in TOKENS}, description


def check_held(path: Path, held: tuple[int, ...], first: int, num_segments: int, segment: int) -> None:
    """Refuse ratios of held memories that no session has: CheckpointError unless each divides a segment."""
    if first < 0 or first + len(held) > num_segments or any(r < 1 or segment % r for r in held):
        raise CheckpointError(f"{path}: {_KEY} names memories of ratios that cannot be. {_ADVICE}")


def check_memory(path: Path, memory: Memory, compressor: Compressor, num_slots: int) -> None:
    """Refuse a memory that `compressor` cannot have written: of other shapes or sizes, or not finite.

    Args:
        num_slots: that so many compressed segments take, with the sink.

    Raises:
        CheckpointError: names the tensor.
    """
    backbone = compressor.backbone
    number = 1 if compressor.is_soft else 2 * len(backbone.layers)
    if len(memory) != (number if num_slots else 0):
        raise CheckpointError(
            f"{path} holds {len(memory)} memory tensors, and its compressed segments take {number if num_slots else 0}."
            f" {_ADVICE}"
        )
    hidden = (backbone.embedding.weight.shape[1],)
    for i, tensor in enumerate(memory):
        is_alike = tensor.dim() == (3 if compressor.is_soft else 4) and tensor.shape[-2] == num_slots
        fits = tensor.shape[-1:] == hidden if compressor.is_soft else tensor.shape[-1] == memory[i % 2].shape[-1]
        if not (is_alike and fits and tensor.shape[0] == 1):
            raise CheckpointError(f"{path}: 'memory.{i}' has the shape {list(tensor.shape)}, not a memory's. {_ADVICE}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: 'memory.{i}' has NaN or infinite values. {_ADVICE}")


def hash_weights(compressor: Compressor) -> str:
    """Return a hash of a compressor's own weights, as float32: the precision they are saved in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(compressor.state_dict().items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
