"""safetensors files: headers read and checked without the data, tensors read and written one at a time.

A model's weights are never in memory as a whole: extending links them, merging and hashing stream them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from longext.checkpoint.source import read_json, refuse_adapter, text_of
from longext.errors import CheckpointError
from longext.untrusted import Kind, decode, open_file, parse_json

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
_WHOLE_NAME = "model.safetensors"
# safetensors' name of a float type that adapters can be merged in -> torch's
TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_LEGACY = ("*.bin", "*.pth", "*.pt")
_MAX_HEADER = 100 * 2**20  # safetensors' own limit
_HASHED_WHOLE = 2**30  # bytes; about a second
_SAMPLES_PER_TENSOR, _NUM_SAMPLES, _SAMPLE = 8, 64, 4096
_BLOCK = 2**20
_CHUNK = 16 * 2**20


def is_float(dtype: str) -> bool:
    """Return True for the name of a floating-point type, those of 4 to 8 bits included."""
    return dtype.startswith(("F", "BF"))


# --- read -------------------------------------------------------------------------------------------------------------


class StoredTensor(NamedTuple):
    """One tensor of a file: `start` and `end` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    name: str
    path: Path

    def read(self) -> torch.Tensor:
        """Return the tensor; the rest of the file is not read."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor

    def blocks(self) -> Iterator[bytes]:
        """Yield its bytes as they are, in pieces."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.end - self.start
            while left > 0:
                block = file.read(min(_CHUNK, left))
                left -= len(block)
                yield block


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        size: of the file, in bytes.
        data_start: where the data begins in it.
        tensors: by name.
        metadata: what its writer noted.
    """

    path: Path
    size: int
    data_start: int
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def tensors_of(shards: Iterable[Shard]) -> dict[str, StoredTensor]:
    """Return every tensor of a model by name."""
    return {name: tensor for shard in shards for name, tensor in shard.tensors.items()}


def read_header(path: Path, kind: Kind = CheckpointError, advice: str = "Download it again.") -> Shard:
    """Read the header of a safetensors file, never its data, and check that the two agree.

    safetensors itself checks it: tensors must fill the data without holes or overlaps, each as many bytes as its shape
    and dtype take. It accepts a name twice (the last one counts), which is refused here.

    Raises:
        FileNotFoundError: there is none.
        LongextError: of `kind`.
    """
    from safetensors import SafetensorError, safe_open

    with open_file(path, kind) as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(8)
        if len(raw) < 8:
            raise kind(f"{path} is truncated: {size} bytes, no safetensors header. {advice}")
        (length,) = struct.unpack("<Q", raw)
        if length > min(_MAX_HEADER, size - 8):
            raise kind(f"{path} has no readable safetensors header (it claims {length} bytes of {size}). {advice}")
        content = file.read(length)
    where, start = f"{path} has a broken safetensors header: it", 8 + length
    header = parse_json(decode(content, where, kind), where, kind, want=dict, advice=advice)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        end = start + _end(header)
        trouble = f"is truncated: {size} bytes, its header describes {end}" if end > size else "has a broken header"
        raise kind(f"{path} {trouble} ({error}). {advice}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), start + first, start + end, name, path)
    return Shard(path, size, start, tensors, metadata)


def _end(header: Mapping[str, Any]) -> int:
    """The end of the data by a header that may say anything; 0 if it says nothing of it."""
    with contextlib.suppress(TypeError, KeyError, IndexError, ValueError):
        return max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")
    return 0


def read_shard(path: Path) -> Shard:
    """Read the header of one of a model's or adapter's weight files.

    Raises:
        CheckpointError: there is no such file, or its header and its data do not agree.
    """
    try:
        return read_header(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"Weight file {path} is named in the index but missing. Download it again.") from error


def read_shards(directory: Path) -> list[Shard]:
    """Return the model's weight shards, headers checked: one file, or those its index names.

    Raises:
        CheckpointError: no safetensors weights (legacy .bin ones are named with the way out), a shard missing or
            truncated, a tensor that the index promises and no shard has, no tensor at all, one that two shards hold,
            or whole numbers as weights.
    """
    refuse_adapter(directory)
    shards = _find_shards(directory)
    names = [name for shard in shards for name in shard.tensors]
    if not names:
        raise CheckpointError(f"{shards[0].path} holds no tensor. Download it again.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"Two weight files in {directory} hold '{twice}'. Download the model again.")
    _check_floats(directory, shards)
    return shards


def weight_index(directory: Path) -> Path | None:
    """Return the index of a model's weight files, None if they are one file.

    transformers takes `model.safetensors` before an index, which a smaller model that was saved there leaves behind.
    """
    index = directory / INDEX_NAME
    return index if index.is_file() and not (directory / _WHOLE_NAME).is_file() else None


def _find_shards(directory: Path) -> list[Shard]:
    index_path = weight_index(directory)
    if index_path is not None:
        weight_map = read_json(index_path, "a weight index").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path} has no weight_map. Download the model again.")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index_path}: weight_map must map names to files. Download the model again.")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if not name or Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index_path} names '{outside[0]}': weight files must be next to their index.")
        shards = [read_shard(directory / name) for name in names]
        missing = sorted(set(weight_map) - set(tensors_of(shards)))
        if missing:
            raise CheckpointError(f"{index_path} promises '{missing[0]}' ({len(missing)} missing), no shard has it.")
        return shards
    files = [file for file in (directory / _WHOLE_NAME,) if file.is_file()] or sorted(
        directory.glob("model*.safetensors")
        or (file for file in directory.glob("*.safetensors") if not file.name.startswith("adapter"))
    )
    if len(files) > 1:
        raise CheckpointError(f"{directory} has {len(files)} safetensors files but no {INDEX_NAME}. Download it again.")
    if files:
        return [read_shard(files[0])]
    legacy = sorted(file.name for pattern in _LEGACY for file in directory.glob(pattern))
    if legacy:
        raise CheckpointError(
            f"{directory} has only legacy pickle weights ({legacy[0]}). Convert them once to safetensors: "
            "load with AutoModelForCausalLM.from_pretrained(DIR) and call .save_pretrained(NEW_DIR)."
        )
    raise CheckpointError(
        f"No *.safetensors weights in {directory} (legacy .bin files of a Hub id are not fetched: convert them first)."
    )


def _check_floats(directory: Path, shards: list[Shard]) -> None:
    """Refuse whole numbers for weights: rounded to them, a model answers with nonsense.

    A quantised model says so in its config; what it holds is for transformers to read.
    """
    if (directory / "config.json").is_file():
        config = read_json(directory / "config.json", "a Hugging Face model directory")
        if config.get("quantization_config") or text_of(config).get("quantization_config"):
            return
    for tensor in tensors_of(shards).values():
        if tensor.name.endswith(".weight") and not is_float(tensor.dtype):
            raise CheckpointError(
                f"{tensor.path}: '{tensor.name}' is stored as {tensor.dtype}, and config.json names no "
                "quantization_config: weights must be floating-point numbers. Give the original, unquantised model."
            )


# --- fingerprints -----------------------------------------------------------------------------------------------------


def main_dtype(directory: Path) -> str:
    """Return torch's name of the float type that most weights of a model are stored in ("float32" if there is none)."""
    counts: Counter[str] = Counter()
    for tensor in tensors_of(read_shards(directory)).values():
        counts[TORCH_NAMES.get(tensor.dtype, "")] += math.prod(tensor.shape)
    counts.pop("", None)
    return counts.most_common(1)[0][0] if counts else "float32"


def fingerprint_weights(directory: Path) -> str:
    """Return what tells one set of weights from another: "whole:HASH", or "sampled:HASH" of more than 1 GiB.

    Whole is SHA-256 over every file. Sampled is SHA-256 over the headers (names, shapes, dtypes) and eight blocks of
    4 kB spread over each tensor: training, merging and rounding change all of a tensor. Times and paths stay out, since
    the same weights are to be known again on another machine.
    """
    shards = read_shards(directory)
    is_small = sum(shard.size for shard in shards) <= _HASHED_WHOLE
    digest = hashlib.sha256()
    for shard in shards:
        with shard.path.open("rb") as file:
            for block in iter(lambda: file.read(_BLOCK), b"") if is_small else _sampled_blocks(shard, file):
                digest.update(block)
    return f"{'whole' if is_small else 'sampled'}:{digest.hexdigest()[:16]}"


def _described(shard: Shard) -> bytes:
    """The header of a file as fingerprints hash it, offsets counted from the data."""
    entries = sorted((t.name, (t.dtype, t.shape, t.start, t.end)) for t in shard.tensors.values())
    start = shard.data_start
    return json.dumps([(name, (dtype, shape, a - start, b - start)) for name, (dtype, shape, a, b) in entries]).encode()


def _sampled_blocks(shard: Shard, file: BinaryIO) -> Iterator[bytes]:
    yield _described(shard)
    for tensor in shard.tensors.values():
        size = tensor.end - tensor.start
        for i in range(_SAMPLES_PER_TENSOR):
            file.seek(tensor.start + max(0, size - _SAMPLE) * i // (_SAMPLES_PER_TENSOR - 1))
            yield file.read(min(_SAMPLE, size))


def same_weights(directory: Path, recorded: str) -> bool:
    """True if the weights in `directory` have the recorded fingerprint; longext 0.1 recorded `sample_weights`."""
    return recorded == (fingerprint_weights(directory) if ":" in recorded else sample_weights(directory))


def sample_weights(directory: Path) -> str:
    """Return the fingerprint that longext 0.1 recorded: a change between its samples passes unnoticed.

    SHA-256 over each shard's tensors (names, shapes, dtypes) and 64 samples of 4 kB spread over its data.
    """
    digest = hashlib.sha256()
    for shard in read_shards(directory):
        digest.update(_described(shard))
        with shard.path.open("rb") as file:
            for i in range(_NUM_SAMPLES):
                file.seek(shard.data_start + (shard.size - shard.data_start) * i // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


# --- write ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write: its safetensors dtype, its shape, and what its bytes come from, in pieces."""

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
