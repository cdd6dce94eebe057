"""Turn an adapter's pickle files into safetensors, without running what a pickle may ask for.

LongLoRA's own code (arXiv 2309.12307) publishes two of them: `adapter_model.bin`, PEFT's old file, and
`trainable_params.bin`, the embeddings and norms that were trained with it. The RoPE is in neither.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.checkpoint.source import resolve_model
from longext.checkpoint.weights import TORCH_NAMES, StoredTensor, read_shard, read_shards, tensors_of
from longext.conversion.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PICKLED_WEIGHTS,
    PREFIX,
    TRAINED_BESIDE,
    is_lora_key,
    locate_in,
    read_adapter,
    read_adapter_config,
    read_ends,
)
from longext.conversion.adapter_base import describe_adapter, find_base, plan_rope, write_base
from longext.conversion.card import adapter_card
from longext.conversion.config import ConvertConfig, ExtendConfig
from longext.conversion.extend import ExtensionPlan, extended_config, plan_extension, provenance
from longext.conversion.files import belongs_to, place_side_file, tokenizer_files, write_json
from longext.errors import CheckpointError, ConfigError
from longext.options import RopeConfig
from longext.staging import check_output, staged_directory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        record: the extension record: base and RoPE.
        num_lora: LoRA tensors.
        num_whole: whole tensors (embeddings, norms).
        notes: what the user should know.
    """

    record: dict[str, Any]
    num_lora: int
    num_whole: int
    notes: tuple[str, ...]


def convert_adapter(config: ConvertConfig) -> Conversion:
    """Write the adapter as PEFT saves one today, with the RoPE it was trained with; it appears when it fits its base.

    Raises:
        ConfigError: no output, or no RoPE is named and the adapter has no config.json.
        CheckpointError: nothing to convert; a pickle that holds more than tensors; tensors that do not fit the base.
    """
    if config.output is None:
        raise ConfigError("Give an output directory with -o.")
    source, output = resolve_model(config.adapter, pickles=True), Path(config.output)
    check_output(output, config.force, protected=source)
    settings = read_adapter_config(source)
    pickles = [source / name for name in (PICKLED_WEIGHTS, TRAINED_BESIDE) if (source / name).is_file()]
    if not pickles:
        raise CheckpointError(f"{source} has neither {PICKLED_WEIGHTS} nor {TRAINED_BESIDE}: nothing to convert.")
    name, revision, base = find_base(config.base, config.revision, source, settings)
    check_output(output, config.force, protected=base)
    plan = _plan(config, source, name, revision, base)
    stored = tensors_of(read_shards(base))
    tensors = _read_all(source, pickles)
    notes = _fit(tensors, settings, base, stored)
    record = {**provenance(plan), "trained": True}
    with staged_directory(output, config.force) as staging:
        _write(staging, tensors, settings)
        describe_adapter(staging, output, "convert", config, extended_config(plan), record, "finished")
        read_adapter(staging, base, stored)
        write_base(staging, base, extended_config(plan))
        for file in [] if notes else (file for file in tokenizer_files(source) if belongs_to(file, source)):
            place_side_file(file, staging)
        (staging / "README.md").write_text(adapter_card(record), encoding="utf-8")
    num_lora = sum(map(is_lora_key, tensors))
    return Conversion(record=record, num_lora=num_lora, num_whole=len(tensors) - num_lora, notes=tuple(notes))


def _plan(config: ConvertConfig, source: Path, name: str, revision: str | None, base: Path) -> ExtensionPlan:
    """The RoPE that the adapter was trained with: as the user says, else that of its config.json."""
    if config.method is not None:
        rope = {field.name: getattr(config, field.name) for field in fields(RopeConfig)}
        return plan_extension(ExtendConfig(model=name, method=config.method, revision=revision, **rope))
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"{source} does not say which RoPE it was trained with: give --method and --factor (LongLoRA: linear and "
            "the context length over the base's, rounded up), or --method none for the base's own RoPE."
        )
    request = ExtendConfig(model=name, method="none", revision=revision)
    return plan_rope(source, base, request, base_is_given=True)[0]


def _read_all(source: Path, pickles: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors of the adapter under PEFT's own keys."""
    tensors: dict[str, torch.Tensor] = {}
    if (source / ADAPTER_WEIGHTS).is_file():
        shard = read_shard(source / ADAPTER_WEIGHTS)
        tensors.update({key: stored.read() for key, stored in shard.tensors.items()})
        pickles = [file for file in pickles if file.name != PICKLED_WEIGHTS]  # the same once more
    for file in pickles:
        for name, tensor in read_pickle(file).items():
            key = _peft_key(name)
            if key in tensors:
                raise CheckpointError(f"{file}: '{name}' is there twice ({key}). Remove one of the two.")
            tensors[key] = tensor
    return tensors


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle file, all of them finite; nothing else in it is built or run.

    Raises:
        CheckpointError: it holds something else, or is broken.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        asks = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {asks[1]}" if asks else " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{file} is not a plain file of tensors ({why}): nothing of it was run. Ask its authors for safetensors."
        ) from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file} holds {type(content).__name__}, not tensors by name.")
    names = {getattr(torch, name) for name in TORCH_NAMES.values()}
    for name, tensor in content.items():
        is_plain = isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not is_plain or tensor.dtype not in names:
            raise CheckpointError(f"{file}: {name!r} is not a dense tensor of floating-point numbers.")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: '{name}' has NaN or infinite values: the adapter is broken.")
    return {name: tensor.detach().contiguous() for name, tensor in content.items()}


def _peft_key(name: str) -> str:
    """The key under which PEFT stores a tensor: wrapper and adapter names left out."""
    name = name.removeprefix("module.")
    for infix in (".default", ".modules_to_save"):
        name = name.replace(f"{infix}.", ".")
    name = name.removesuffix(".default")
    return name if name.startswith(PREFIX) else PREFIX + name


def _fit(
    tensors: dict[str, torch.Tensor], settings: dict[str, Any], base: Path, stored: dict[str, StoredTensor]
) -> list[str]:
    """Make whole tensors the modules_to_save of the adapter; drop the rows of tokens that the base has not."""
    whole = [key for key in tensors if not is_lora_key(key)]
    locate = locate_in(set(stored))
    notes = []
    for key in whole:
        base_tensor = stored.get(locate(key.removeprefix(PREFIX)) or "")
        is_alike = base_tensor is not None and base_tensor.shape and tensors[key].shape[1:] == base_tensor.shape[1:]
        extra = tensors[key].shape[0] - base_tensor.shape[0] if base_tensor is not None and is_alike else 0
        if extra > 0 and tensors[key].ndim == 2:
            tensors[key] = tensors[key][:-extra].contiguous()
            notes.append(
                f"'{key}' has {extra} rows more than the base: tokens that were added for training (LongLoRA's padding "
                "token), left out. Every token of the base keeps its numbers."
            )
    modules = {key.removeprefix(PREFIX).rpartition(".")[0] for key in whole}
    settings["modules_to_save"] = sorted({*(settings.get("modules_to_save") or []), *modules}) or None
    ends = read_ends(base, stored)
    if ends.is_tied and PREFIX + ends.embedding in whole:
        settings["ensure_weight_tying"] = True
        tensors.setdefault(PREFIX + ends.head, tensors[PREFIX + ends.embedding].clone())
    return notes


def _write(directory: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(directory / ADAPTER_CONFIG, settings)
