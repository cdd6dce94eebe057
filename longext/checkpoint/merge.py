"""Merge a LoRA adapter into its base: a standard checkpoint, written one tensor at a time and proven before it appears.

W + scaling * B A in float32, whole tensors replaced, everything else copied bit for bit; the RoPE is the one the
adapter was trained with, in both layouts of config.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.checkpoint.adapter import (
    Adapter,
    changes_something,
    find_adapter,
    has_model_config,
    merged_tensor,
    read_adapter,
    read_adapter_config,
)
from longext.checkpoint.bundled import BUNDLED_MODELS
from longext.checkpoint.card import license_of, model_card
from longext.checkpoint.extend import (
    ExtensionPlan,
    extended_config,
    place_file,
    provenance,
    raise_length,
    side_files,
    trained_rope,
    write_json,
    written_rope,
)
from longext.checkpoint.proof import Proof, prove_merge
from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import HUB_ID, INDEX_NAME, Shard, read_json, read_shards, resolve_model, sample_weights
from longext.checkpoint.writing import ITEM_BYTES, TORCH_NAMES, TensorPlan, read_tensor, stored_blocks, write_shard
from longext.config import ExtendConfig, MergeConfig
from longext.errors import CheckpointError, ConfigError
from longext.manifest import read_manifest, write_manifest
from longext.rope.reading import spec_from_json
from longext.staging import check_output, staged_directory

if TYPE_CHECKING:
    import torch

_STORED_NAMES = {name: stored for stored, name in TORCH_NAMES.items()}
_CHOICES = ("auto", "float32", "bfloat16", "float16")
# What an adapter directory may hold of a tokenizer; its other files describe the training.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Everything `merge` is going to do, before it does it.

    Attributes:
        config: what was asked.
        adapter: the adapter, read against the base.
        extension: the RoPE that is written, as an extension of the base; its `source` is the base's directory.
        record: what run.json will say about it.
        shards: the base's weight files.
        dtypes: safetensors type of every tensor that is written.
        stays_tied: True where the output matrix is the input embedding, before and after.
        config_directory: whose config.json the adapter's side of the proof is built from.
        notes: what the user should know.
    """

    config: MergeConfig
    adapter: Adapter
    extension: ExtensionPlan
    record: dict[str, Any]
    shards: tuple[Shard, ...]
    dtypes: dict[str, str]
    stays_tied: bool
    config_directory: Path
    notes: tuple[str, ...]

    @property
    def base(self) -> Path:
        """Directory of the base model."""
        return self.extension.source

    @property
    def homes(self) -> dict[str, Shard]:
        """Tensor name -> the file of the base that holds it (an untied output matrix: its embedding's)."""
        homes = {name: shard for shard in self.shards for name in shard.tensors}
        return {name: homes.get(name, homes[self.adapter.embedding]) for name in self.dtypes}

    @property
    def weight_bytes(self) -> int:
        """Size of the base's weight files, about what will be written."""
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge did.

    Attributes:
        merge: the plan that was carried out.
        counts: kind of change -> (tensors, parameters).
        proof: the figures of the comparison, or None with `--no-check`.
        files: weight file -> SHA-256.
    """

    merge: Merge
    counts: dict[str, tuple[int, int]]
    proof: Proof | None
    files: dict[str, str]

    @property
    def summary(self) -> dict[str, Any]:
        """What run.json keeps under `merge`."""
        touched = self.merge.adapter.touched
        return {
            "adapter": self.merge.config.adapter,
            "dtypes": sorted({TORCH_NAMES.get(dtype, dtype) for dtype in self.merge.dtypes.values()}),
            "output_matrix": "tied" if self.merge.stays_tied else "separate",
            "counts": {kind: {"tensors": n, "parameters": size} for kind, (n, size) in self.counts.items()},
            "touched": sorted(name for name in self.merge.dtypes if name in touched or name not in _names(self.merge)),
            "proof": None if self.proof is None else dataclasses.asdict(self.proof),
            "files": self.files,
        }


def _names(merge: Merge) -> set[str]:
    return {name for shard in merge.shards for name in shard.tensors}


def merge_adapter(config: MergeConfig, on_progress: Callable[[int], None] | None = None) -> MergeResult:
    """Write the merged checkpoint to `config.output`; it appears only when it is complete and proven.

    Args:
        on_progress: called with the bytes just written.

    Raises:
        ConfigError, CheckpointError: as `plan_merge`.
        VerificationError: logits(base + adapter) and logits(merged) differ.
    """
    return write_merge(plan_merge(config), on_progress)


def plan_merge(config: MergeConfig) -> Merge:
    """Find adapter and base, check that they fit each other tensor by tensor, and work out what will be written.

    Raises:
        CheckpointError: no adapter, no base, an adapter of another kind, for another base, incomplete or empty.
        ConfigError: no output, one that exists or overlaps the base or the adapter; an unknown `dtype`.
    """
    if config.output is None:
        raise ConfigError("Give an output directory with -o.")
    check_output(Path(config.output), config.force)
    if config.dtype not in _CHOICES:
        raise ConfigError(f"--dtype must be one of {', '.join(_CHOICES)}, got '{config.dtype}'.")
    directory = find_adapter(config.adapter)
    for protected in (directory, find_base(config, directory, read_adapter_config(directory))[2]):
        check_output(Path(config.output), config.force, protected=protected)
    return read_merge(config)


def read_merge(config: MergeConfig) -> Merge:
    """Return what `plan_merge` plans, for a merge that stays in memory: no output is asked for or checked.

    Raises:
        CheckpointError: as `plan_merge`.
    """
    directory = find_adapter(config.adapter)
    settings = read_adapter_config(directory)
    name, revision, base = find_base(config, directory, settings)
    shards = read_shards(base)
    asked = ExtendConfig(model=name, method="none", revision=revision)
    extension, record, notes = _plan_rope(directory, base, asked, config.trust_remote_code)
    adapter = read_adapter(directory, base, shards, config.trust_remote_code)
    _check_base_weights(directory, name, base)
    stored = _Stored(adapter, shards)
    if not changes_something(adapter, stored.read):
        raise CheckpointError(
            f"The adapter {directory} changes nothing: every LoRA B is zero and every saved tensor is the base's. "
            "It was never trained, or saved by ZeRO-3 without gathering its shards; gather them and save it again."
        )
    stays_tied = adapter.is_tied and _stays_tied(adapter, stored)
    if adapter.is_tied and not stays_tied:
        notes.append("The adapter trained embedding and output matrix apart: both are written, no longer tied.")
    return Merge(
        config=config,
        adapter=adapter,
        extension=dataclasses.replace(extension, shards=tuple(shards)),
        record=record,
        shards=tuple(shards),
        dtypes=_dtypes(config.dtype, shards, adapter, stays_tied),
        stays_tied=stays_tied,
        config_directory=directory if (directory / "config.json").is_file() else base,
        notes=tuple(notes),
    )


def find_base(config: MergeConfig, adapter: Path, settings: dict[str, Any]) -> tuple[str, str | None, Path]:
    """Return (name, revision, directory) of the base: --base, else what run.json, then adapter_config.json name.

    Raises:
        CheckpointError: none of them is here; lists what was looked for.
    """
    if config.base is not None:
        return config.base, config.revision, resolve_model(config.base, config.revision)
    record = read_manifest(adapter).get("extension") or {}
    if record.get("base_path") and Path(record["base_path"]).is_dir():
        return record["base_model"], record.get("base_revision"), Path(record["base_path"])
    named = [
        (record.get("base_model"), record.get("base_revision")),
        (settings.get("base_model_name_or_path"), settings.get("revision")),
    ]
    for name, revision in named:
        if name and (name in BUNDLED_MODELS or Path(name).is_dir()):
            return name, revision, resolve_model(name)
    for name, revision in named:
        if name and HUB_ID.match(name):
            return name, revision, resolve_model(name, revision)
    looked = " and ".join(f"'{name}'" for name in dict.fromkeys(name for name, _ in named if name)) or "no base"
    raise CheckpointError(f"The adapter {adapter} names {looked}, which is not here. Give its base with --base MODEL.")


def _check_base_weights(adapter: Path, name: str, base: Path) -> None:
    """Raise CheckpointError where longext noted which weights the adapter was trained on, and these are others."""
    trained_on = (read_manifest(adapter).get("extension") or {}).get("base_weights")
    if trained_on is not None and trained_on != sample_weights(base):
        raise CheckpointError(
            f"The adapter {adapter} was trained on other weights than those of {name}, though of the same shapes. Give "
            "the model it was trained on with --base."
        )


def _plan_rope(
    directory: Path, base: Path, asked: ExtendConfig, trust_remote_code: bool
) -> tuple[ExtensionPlan, dict[str, Any], list[str]]:
    """The RoPE to write, as a trained extension of the base: that of the adapter's config.json, else the base's.

    longext's own record in the adapter's run.json says which method and which origin it had.
    """
    rope = read_model_rope(base, trust_remote_code)
    record = read_manifest(directory).get("extension") or {}
    notes: list[str] = []
    if has_model_config(directory, base):
        theirs = read_model_rope(directory, trust_remote_code)
        spec = written_rope(directory, theirs)
        if record and record["rope_parameters"] != theirs.parameters:
            raise CheckpointError(
                f"{directory}: config.json and run.json state different rope_parameters. Restore the config.json that "
                "was saved with the adapter, or remove run.json to go by config.json alone."
            )
    else:
        theirs, record = rope, {}
        spec = written_rope(base, rope)
        notes.append(
            f"The adapter has no config.json: the RoPE is the base's ({spec.method}, {rope.max_position_embeddings:,} "
            "tokens). If it was trained with another, extend the base first and give that with --base."
        )
    is_kept = theirs.parameters == rope.parameters
    plan = ExtensionPlan(
        config=dataclasses.replace(asked, method=spec.method),
        source=base,
        rope=rope,
        origin=spec_from_json(record["origin"]) if "origin" in record else trained_rope(base, rope)[0],
        spec=spec,
        parameters=theirs.parameters,
        old_length=rope.max_position_embeddings,
        new_length=record.get("new_length", theirs.max_position_embeddings),
        relation=record.get("relation", "keeps" if is_kept else "replaces"),
        shards=(),
        side_files=side_files(base),
    )
    return plan, {**provenance(plan), "trained": True}, notes


@dataclass(frozen=True)
class _Stored:
    """The base's tensors by name; a tied output matrix is its embedding."""

    adapter: Adapter
    shards: list[Shard]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the base."""
        homes = {tensor: shard for shard in self.shards for tensor in shard.tensors}
        name = name if name in homes else self.adapter.embedding
        return read_tensor(homes[name], name)


def _stays_tied(adapter: Adapter, stored: _Stored) -> bool:
    """True where embedding and output matrix are still one after the merge (equal to float32 rounding)."""
    ends = (adapter.embedding, adapter.head)
    if not adapter.touched & set(ends):
        return True
    first, second = (merged_tensor(adapter, name, stored.read(name)) for name in ends)
    return bool(first.allclose(second, rtol=1e-6, atol=0))


def _dtypes(asked: str, shards: list[Shard], adapter: Adapter, stays_tied: bool) -> dict[str, str]:
    """Safetensors type of every tensor to write: the base's own, or the one asked for where it is a float."""
    own = {name: entry[0] for shard in shards for name, entry in shard.tensors.items()}
    if adapter.is_tied and not stays_tied:
        own.setdefault(adapter.head, own[adapter.embedding])
    if asked == "auto":
        return own
    return {name: _STORED_NAMES[asked] if dtype in TORCH_NAMES else dtype for name, dtype in own.items()}


def write_merge(merge: Merge, on_progress: Callable[[int], None] | None = None) -> MergeResult:
    """Carry out a plan: weights, config, tokenizer, proof, card and run.json in a hidden sibling, then the rename.

    Raises:
        VerificationError: logits(base + adapter) and logits(merged) differ.
    """
    assert merge.config.output is not None, "plan_merge checked it"
    with staged_directory(Path(merge.config.output), merge.config.force) as staging:
        files = _write_weights(merge, staging, on_progress)
        _write_side_files(merge, staging)
        proof = _prove(merge, staging) if merge.config.check else None
        result = MergeResult(merge=merge, counts=_counts(merge), proof=proof, files=files)
        card = model_card(merge.record, merge.extension.layers, license_of(merge.base), merge=result.summary)
        (staging / "README.md").write_text(card, encoding="utf-8")
        write_manifest(staging, "merge", merge.config, extension=merge.record, merge=result.summary)
    return result


def _write_weights(merge: Merge, staging: Path, on_progress: Callable[[int], None] | None) -> dict[str, str]:
    """Write the shards under the base's file names, and their index; return file -> SHA-256."""
    by_file: dict[str, dict[str, TensorPlan]] = {shard.path.name: {} for shard in merge.shards}
    for name, home in merge.homes.items():
        by_file[home.path.name][name] = _tensor_plan(merge, home, name)
    if (merge.base / INDEX_NAME).is_file():
        index = read_json(merge.base / INDEX_NAME, "a weight index")
        total = sum(plan.num_bytes for plans in by_file.values() for plan in plans.values())
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        index["weight_map"] = {name: file for file, plans in by_file.items() for name in sorted(plans)}
        write_json(staging / INDEX_NAME, index)
    return {file: write_shard(staging / file, plans, on_progress) for file, plans in by_file.items()}


def _tensor_plan(merge: Merge, home: Shard, name: str) -> TensorPlan:
    """How one tensor is written: copied where nothing changes it, else computed in float32 and rounded once."""
    source = name if name in home.tensors else merge.adapter.embedding
    stored, shape, start, end = home.tensors[source]
    dtype = merge.dtypes[name]
    if name not in merge.adapter.touched and dtype == stored:
        return TensorPlan(dtype, shape, end - start, partial(stored_blocks, home, source))
    count = 1
    for size in shape:
        count *= size
    return TensorPlan(dtype, shape, count * ITEM_BYTES[dtype], partial(_computed_blocks, merge, home, source, name))


def _computed_blocks(merge: Merge, home: Shard, source: str, name: str) -> Iterator[bytes]:
    """Yield the bytes of one merged or converted tensor."""
    import torch

    tensor = _computed_tensor(merge, home, source, name)
    yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _computed_tensor(merge: Merge, home: Shard, source: str, name: str) -> torch.Tensor:
    import torch

    tensor = read_tensor(home, source)
    if name in merge.adapter.touched:
        tensor = merged_tensor(merge.adapter, name, tensor)
    rounded = tensor.to(getattr(torch, TORCH_NAMES[merge.dtypes[name]]))
    if tensor.isfinite().all() and not rounded.isfinite().all():
        raise CheckpointError(f"'{name}' does not fit {rounded.dtype}: use --dtype bfloat16 or float32.")
    return rounded


def written_tensors(merge: Merge) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of everything that the merged checkpoint holds and the base does not, as it is written."""
    for name, home in merge.homes.items():
        if name in merge.adapter.touched or name not in home.tensors:
            yield name, _computed_tensor(merge, home, name if name in home.tensors else merge.adapter.embedding, name)


def _write_side_files(merge: Merge, staging: Path) -> None:
    """Write config.json and copy the small files: the adapter's tokenizer wins over the base's."""
    own = (file for pattern in _TOKENIZER_FILES for file in merge.adapter.directory.glob(pattern) if file.is_file())
    for name, file in {file.name: file for file in (*merge.extension.side_files, *own)}.items():
        place_file(file, staging / name, force_copy=True)
    write_json(staging / "config.json", merged_config(merge))
    raise_length(staging / "tokenizer_config.json", "model_max_length", merge.extension.new_length)
    raise_length(staging / "generation_config.json", "max_length", merge.extension.new_length)


def merged_config(merge: Merge) -> dict[str, Any]:
    """Return the base's config.json with the RoPE in both layouts, the written type, and whether the ends are tied."""
    config = extended_config(merge.extension)
    text = config.get("text_config")
    sections = [config, text] if isinstance(text, dict) else [config]
    if merge.config.dtype != "auto":
        for section in sections:
            key = "torch_dtype" if "torch_dtype" in section and "dtype" not in section else "dtype"
            if section is config or key in section:
                section[key] = merge.config.dtype
    if merge.adapter.is_tied and not merge.stays_tied:
        for section in sections:
            if section is config or "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = False
    return config


def _prove(merge: Merge, staging: Path) -> Proof:
    def locate(parameter: str) -> str | None:
        name = merge.adapter.locate(parameter) or parameter
        return name if name in merge.dtypes else None

    return prove_merge(
        merge.base,
        merge.adapter.directory,
        staging,
        merge.config_directory,
        merge.extension.spec.original_max_position_embeddings,
        locate,
        merge.config.trust_remote_code,
    )


def _counts(merge: Merge) -> dict[str, tuple[int, int]]:
    """Tensors and parameters by what happened to them."""
    counts: dict[str, tuple[int, int]] = {}
    for name, home in merge.homes.items():
        shape = home.tensors[name if name in home.tensors else merge.adapter.embedding][1]
        kind, size = _kind(merge.adapter, name, len(shape)), 1
        for length in shape:
            size *= length
        tensors, parameters = counts.get(kind, (0, 0))
        counts[kind] = (tensors + 1, parameters + size)
    return counts


def _kind(adapter: Adapter, name: str, dimensions: int) -> str:
    if name in adapter.lora:
        return "LoRA added"
    if name not in adapter.full:
        return "copied"
    if name in (adapter.embedding, adapter.head):
        return "embedding replaced"
    return "norm replaced" if dimensions == 1 and "norm" in name else "other replaced"


def describe_rope(parameters: dict[str, Any]) -> str:
    """Return rope_parameters on one line, long lists shortened."""
    return json.dumps({k: f"[{len(v)} numbers]" if isinstance(v, list) else v for k, v in parameters.items()})
