"""Read and write safetensors files one tensor at a time, so that no more than one is ever in memory."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longext.checkpoint.source import Shard

if TYPE_CHECKING:
    import torch

# safetensors' name of a float type -> torch's
TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write: its safetensors dtype, its shape, and where its bytes come from, in pieces."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    blocks: Callable[[], Iterator[bytes]]


def write_shard(path: Path, tensors: Mapping[str, TensorPlan], on_progress: Callable[[int], None] | None = None) -> str:
    """Write `tensors` to `path` and return the SHA-256 of the file.

    Wider types come first, as the format's own writer orders them: every tensor is then aligned.

    Args:
        on_progress: called with the bytes just written.
    """
    names = sorted(tensors, key=lambda name: (-ITEM_BYTES.get(tensors[name].dtype, 1), name))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in _file_blocks(tensors, names):
            file.write(block)
            digest.update(block)
            if on_progress:
                on_progress(len(block))
    return digest.hexdigest()


def _file_blocks(tensors: Mapping[str, TensorPlan], names: list[str]) -> Iterator[bytes]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        plan = tensors[name]
        header[name] = {"dtype": plan.dtype, "shape": plan.shape, "data_offsets": [end, end + plan.num_bytes]}
        end += plan.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        written = 0
        for block in tensors[name].blocks():
            written += len(block)
            yield block
        assert written == tensors[name].num_bytes, f"{name}: {written} bytes, {tensors[name].num_bytes} announced"


def read_tensor(shard: Shard, name: str) -> torch.Tensor:
    """Return one stored tensor; the rest of the file is not read."""
    from safetensors import safe_open

    with safe_open(shard.path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def stored_blocks(shard: Shard, name: str) -> Iterator[bytes]:
    """Yield the bytes of one stored tensor as they are, in pieces."""
    _, _, start, end = shard.tensors[name]
    with shard.path.open("rb") as file:
        file.seek(shard.data_start + start)
        left = end - start
        while left > 0:
            block = file.read(min(_CHUNK, left))
            left -= len(block)
            yield block
