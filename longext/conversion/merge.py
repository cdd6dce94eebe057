"""Merge a LoRA adapter into its base: a standard checkpoint, written one tensor at a time and proven before it appears.

W + scaling * B A in float32, whole tensors replaced, everything else copied bit for bit; the RoPE is the one the
adapter was trained with, in both layouts of config.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.checkpoint.source import read_json, text_of
from longext.checkpoint.tying import untied
from longext.checkpoint.weights import (
    ITEM_BYTES,
    TORCH_NAMES,
    StoredTensor,
    TensorPlan,
    read_shards,
    tensors_of,
    weight_index,
    write_shard,
)
from longext.conversion.adapter import (
    Adapter,
    changes_something,
    find_adapter,
    merged_tensor,
    read_adapter,
    read_adapter_config,
)
from longext.conversion.adapter_base import check_base_weights, find_base, plan_rope
from longext.conversion.card import license_of, model_card
from longext.conversion.config import ExtendConfig, MergeConfig
from longext.conversion.extend import ExtensionPlan, extended_config
from longext.conversion.files import (
    belongs_to,
    left_out,
    left_out_note,
    place_side_file,
    raise_lengths,
    side_name,
    tokenizer_files,
    write_json,
)
from longext.conversion.proof import Proof, prove_merge
from longext.errors import CheckpointError, ConfigError
from longext.manifest import write_manifest, write_text
from longext.staging import check_output, staged_directory

if TYPE_CHECKING:
    import torch

_STORED_NAMES = {name: stored for stored, name in TORCH_NAMES.items()}
_CHOICES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Everything `merge` is going to do, before it does it.

    Attributes:
        config: what the user wants.
        adapter: the adapter, read against the base.
        extension: the RoPE that is written, as an extension of the base; its `source` is the base's directory.
        record: what run.json will say about it.
        sources: tensor to write -> the base's tensor it is made of (an output matrix no longer tied: the embedding).
        dtypes: safetensors type of every tensor that is written.
        stays_tied: True if the output matrix is the input embedding, before and after.
        config_directory: whose config.json the adapter's side of the proof is built from.
        notes: what the user should know.
    """

    config: MergeConfig
    adapter: Adapter
    extension: ExtensionPlan
    record: dict[str, Any]
    sources: dict[str, StoredTensor]
    dtypes: dict[str, str]
    stays_tied: bool
    config_directory: Path
    notes: tuple[str, ...]

    @property
    def base(self) -> Path:
        """Directory of the base model."""
        return self.extension.source

    def changes(self, name: str) -> bool:
        """True if the base holds no such tensor, or the adapter changes it."""
        return name in self.adapter.touched or name != self.sources[name].name


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
        return {
            "adapter": self.merge.config.adapter,
            "dtypes": sorted({TORCH_NAMES.get(dtype, dtype) for dtype in self.merge.dtypes.values()}),
            "output_matrix": "tied" if self.merge.stays_tied else "separate",
            "counts": {kind: {"tensors": n, "parameters": size} for kind, (n, size) in self.counts.items()},
            "touched": sorted(filter(self.merge.changes, self.merge.sources)),
            "proof": None if self.proof is None else dataclasses.asdict(self.proof),
            "files": self.files,
        }


# --- plan -------------------------------------------------------------------------------------------------------------


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
    return read_merge(config, Path(config.output))


def read_merge(config: MergeConfig, output: Path | None = None) -> Merge:
    """Return what `plan_merge` plans; without `output` for a merge that stays in memory.

    Raises:
        CheckpointError, ConfigError: as `plan_merge`.
    """
    directory = find_adapter(config.adapter)
    settings = read_adapter_config(directory)
    name, revision, base = find_base(config.base, config.revision, directory, settings)
    for protected in (directory, base) if output is not None else ():
        assert output is not None
        check_output(output, config.force, protected=protected)
    shards = read_shards(base)
    request = ExtendConfig(model=name, method="none", revision=revision)
    extension, record, config_directory, notes = plan_rope(
        directory, base, request, base_is_given=config.base is not None, trust_remote_code=config.trust_remote_code
    )
    tensors = tensors_of(shards)
    adapter = read_adapter(directory, base, tensors, config.trust_remote_code)
    check_base_weights(directory, name, base)
    sources = {**tensors, adapter.head: tensors.get(adapter.head, tensors[adapter.embedding])}
    if not changes_something(adapter, sources):
        raise CheckpointError(
            f"The adapter {directory} changes nothing: every LoRA B is zero and every saved tensor is the base's. "
            "It was never trained, or saved by ZeRO-3 without gathering its shards; gather them and save it again."
        )
    notes += [*left_out(base), *left_out_note(tokenizer_files(directory), directory)]
    stays_tied = adapter.is_tied and _stays_tied(adapter, sources)
    if adapter.is_tied and not stays_tied:
        notes.append("The adapter trained embedding and output matrix apart: both are written, no longer tied.")
    if adapter.difference:
        notes.append(
            f"config.json of {name} says tie_word_embeddings, but its files hold another output matrix (largest "
            f"difference {adapter.difference:.2g}): both are kept, as transformers 5 does, and the merged config.json "
            "says false. Readers that go by the flag (transformers 4, vLLM) compute something else with that base."
        )
    written = tensors if stays_tied else sources
    return Merge(
        config=config,
        adapter=adapter,
        extension=dataclasses.replace(extension, shards=tuple(shards)),
        record=record,
        sources=written,
        dtypes={written_name: _written_dtype(source, config.dtype) for written_name, source in written.items()},
        stays_tied=stays_tied,
        config_directory=config_directory,
        notes=tuple(notes),
    )


def _stays_tied(adapter: Adapter, sources: dict[str, StoredTensor]) -> bool:
    """True if embedding and output matrix are still one after the merge (equal to float32 rounding)."""
    ends = (adapter.embedding, adapter.head)
    if not adapter.touched & set(ends):
        return True
    first, second = (merged_tensor(adapter, name, sources[name].read()) for name in ends)
    return bool(first.allclose(second, rtol=1e-6, atol=0))


def _written_dtype(source: StoredTensor, dtype: str) -> str:
    """The base's own type, or the one that the user wants if it is a float."""
    return source.dtype if dtype == "auto" or source.dtype not in TORCH_NAMES else _STORED_NAMES[dtype]


def merged_config(merge: Merge) -> dict[str, Any]:
    """Return the base's config.json with the RoPE in both layouts, the written type, and whether the ends are tied."""
    config = extended_config(merge.extension)
    if merge.config.dtype != "auto":
        for section in (config, text_of(config)):
            key = "torch_dtype" if "torch_dtype" in section and "dtype" not in section else "dtype"
            if section is config or key in section:
                section[key] = merge.config.dtype
    is_no_longer_tied = (merge.adapter.is_tied and not merge.stays_tied) or merge.adapter.difference
    return untied(config) if is_no_longer_tied else config


# --- write ------------------------------------------------------------------------------------------------------------


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
        write_text(staging / "README.md", card)
        write_manifest(staging, "merge", merge.config, extension=merge.record, merge=result.summary)
    return result


def _write_weights(merge: Merge, staging: Path, on_progress: Callable[[int], None] | None) -> dict[str, str]:
    """Write the shards under the base's file names, and their index; return file -> SHA-256."""
    by_file: dict[str, dict[str, TensorPlan]] = {shard.path.name: {} for shard in merge.extension.shards}
    for name, source in merge.sources.items():
        by_file[source.path.name][name] = _tensor_plan(merge, name, source)
    if path := weight_index(merge.base):
        index = read_json(path, "a weight index")
        total = sum(plan.num_bytes for plans in by_file.values() for plan in plans.values())
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        index["weight_map"] = {name: file for file, plans in by_file.items() for name in sorted(plans)}
        write_json(staging / path.name, index)
    return {file: write_shard(staging / file, plans, on_progress) for file, plans in by_file.items()}


def _tensor_plan(merge: Merge, name: str, source: StoredTensor) -> TensorPlan:
    """How one tensor is written: copied if nothing changes it, else computed in float32 and rounded once."""
    dtype = merge.dtypes[name]
    if name not in merge.adapter.touched and dtype == source.dtype:
        return TensorPlan(dtype, source.shape, source.end - source.start, source.blocks)
    num_bytes = math.prod(source.shape) * ITEM_BYTES[dtype]
    return TensorPlan(dtype, source.shape, num_bytes, partial(_computed_blocks, merge, name))


def _computed_blocks(merge: Merge, name: str) -> Iterator[bytes]:
    import torch

    yield _computed_tensor(merge, name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _computed_tensor(merge: Merge, name: str) -> torch.Tensor:
    """One merged or converted tensor as it is written."""
    import torch

    tensor = merge.sources[name].read()
    if name in merge.adapter.touched:
        tensor = merged_tensor(merge.adapter, name, tensor)
    rounded = tensor.to(getattr(torch, TORCH_NAMES[merge.dtypes[name]]))
    if tensor.isfinite().all() and not rounded.isfinite().all():
        raise CheckpointError(f"'{name}' does not fit {rounded.dtype}: use --dtype bfloat16 or float32.")
    return rounded


def written_tensors(merge: Merge) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of everything that the merged checkpoint holds and the base does not, as it is written."""
    return ((name, _computed_tensor(merge, name)) for name in merge.sources if merge.changes(name))


def _write_side_files(merge: Merge, staging: Path) -> None:
    """Write config.json and copy the small files: the adapter's tokenizer wins over the base's."""
    directory = merge.adapter.path.parent
    replacing = [file for file in tokenizer_files(directory) if belongs_to(file, directory)]
    for file in {side_name(file): file for file in (*merge.extension.side_files, *replacing)}.values():
        place_side_file(file, staging)
    write_json(staging / "config.json", merged_config(merge))
    raise_lengths(staging, merge.extension.new_length)


def _prove(merge: Merge, staging: Path) -> Proof:
    def locate(parameter: str) -> str | None:
        name = merge.adapter.locate(parameter) or parameter
        return name if name in merge.dtypes else None

    return prove_merge(
        merge.base,
        merge.adapter.path.parent,
        staging,
        merge.config_directory,
        merge.extension.spec.original_max_position_embeddings,
        locate,
        merge.config.trust_remote_code,
    )


def _counts(merge: Merge) -> dict[str, tuple[int, int]]:
    """Tensors and parameters by what happened to them."""
    counts: dict[str, tuple[int, int]] = {}
    for name, source in merge.sources.items():
        kind = _kind(merge.adapter, name, len(source.shape))
        tensors, parameters = counts.get(kind, (0, 0))
        counts[kind] = (tensors + 1, parameters + math.prod(source.shape))
    return counts


def _kind(adapter: Adapter, name: str, dimensions: int) -> str:
    if name in adapter.lora:
        return "LoRA added"
    if name not in adapter.full:
        return "copied"
    if name in (adapter.embedding, adapter.head):
        return "embedding replaced"
    return "norm replaced" if dimensions == 1 and "norm" in name else "other replaced"
