"""Find a model's files: bundled name, local directory or Hub id; and read safetensors headers without the data."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from longext import untrusted
from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.header import FLOATS, read_header
from longext.checkpoint.ranges import check_model_config
from longext.errors import CheckpointError
from longext.registry import did_you_mean

INDEX_NAME = "model.safetensors.index.json"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_RESTORE = "Restore it from the original model."
_LEGACY = ("*.bin", "*.pth", "*.pt")
_HUB_IGNORED = [*_LEGACY, "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "*.ot"]
_NUM_SAMPLES = 64
_HASHED_WHOLE = 2**30  # bytes; about a second
_SAMPLES_PER_TENSOR, _SAMPLE = 8, 4096
_BLOCK = 2**20


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


def is_adapter(directory: Path) -> bool:
    """Return True for a directory that holds an adapter; the weights of its base may lie there as well.

    transformers, too, puts an adapter into the model beside it.
    """
    return (directory / "adapter_config.json").is_file()


def refuse_adapter(directory: Path) -> None:
    """Raise CheckpointError for an adapter directory: what is asked for is a model."""
    if is_adapter(directory):
        raise CheckpointError(f"{directory} holds an adapter, not a model. Merge it first: longext merge {directory}")


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors as (dtype, shape, start, end), byte offsets counted from `data_start`."""

    path: Path
    size: int
    data_start: int
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file, never its data, and check that the file is whole.

    Raises:
        CheckpointError: there is no such file, or its header and its data do not agree.
    """
    try:
        header = read_header(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"Weight file {path} is named in the index but missing. Download it again.") from error
    return Shard(path, header.size, header.data_start, header.tensors)


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


def _sampled_blocks(shard: Shard, file: BinaryIO) -> Iterator[bytes]:
    yield json.dumps(sorted(shard.tensors.items())).encode()
    for _, _, start, end in shard.tensors.values():
        for i in range(_SAMPLES_PER_TENSOR):
            file.seek(shard.data_start + start + max(0, end - start - _SAMPLE) * i // (_SAMPLES_PER_TENSOR - 1))
            yield file.read(min(_SAMPLE, end - start))


def same_weights(directory: Path, recorded: str) -> bool:
    """True if the weights in `directory` have the recorded fingerprint; longext 0.1 recorded `sample_weights`."""
    return recorded == (fingerprint_weights(directory) if ":" in recorded else sample_weights(directory))


def sample_weights(directory: Path) -> str:
    """Return the fingerprint that longext 0.1 recorded: a change between its samples passes unnoticed.

    SHA-256 over each shard's tensors (names, shapes, dtypes) and 64 samples of 4 kB spread over its data.
    """
    digest = hashlib.sha256()
    for shard in read_shards(directory):
        digest.update(json.dumps(sorted(shard.tensors.items())).encode())
        with shard.path.open("rb") as file:
            for i in range(_NUM_SAMPLES):
                file.seek(shard.data_start + (shard.size - shard.data_start) * i // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _check_floats(directory: Path, shards: list[Shard]) -> None:
    """Refuse whole numbers where weights must be: rounded to them, a model answers with nonsense.

    A quantised model says so in its config; what it holds is for transformers to read.
    """
    if (directory / "config.json").is_file():
        config = read_json(directory / "config.json", "a Hugging Face model directory")
        text = config.get("text_config")
        if config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config")):
            return
    for shard in shards:
        for name, (dtype, *_) in shard.tensors.items():
            if name.endswith(".weight") and dtype not in FLOATS:
                raise CheckpointError(
                    f"{shard.path}: '{name}' is stored as {dtype}, and config.json names no quantization_config: "
                    "weights must be floating-point numbers. Give the original, unquantised model."
                )


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


def _find_shards(directory: Path) -> list[Shard]:
    index_path = directory / INDEX_NAME
    if index_path.is_file():
        weight_map = read_json(index_path, "a weight index").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path} has no weight_map. Download the model again.")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index_path}: weight_map must map names to files. Download the model again.")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if not name or Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index_path} names '{outside[0]}': weight files must lie beside their index.")
        shards = [read_shard(directory / name) for name in names]
        held = {tensor for shard in shards for tensor in shard.tensors}
        missing = sorted(set(weight_map) - held)
        if missing:
            raise CheckpointError(f"{index_path} promises '{missing[0]}' ({len(missing)} missing), no shard has it.")
        return shards
    files = sorted(directory.glob("model*.safetensors")) or sorted(
        file for file in directory.glob("*.safetensors") if not file.name.startswith("adapter")
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
