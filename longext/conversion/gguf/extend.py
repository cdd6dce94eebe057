"""Extend a GGUF file: its RoPE keys change and a small tensor is added; every weight is copied as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import longext
from longext.attention.bands import no_checkpoint
from longext.checkpoint.gguf import STRING, GgufFile, Value, is_gguf, read_gguf, write_changed
from longext.checkpoint.gguf_rope import FREQS, GgufRope, gguf_rope, read_gguf_rope
from longext.checkpoint.rope_config import ModelRope
from longext.conversion.config import ExtendConfig
from longext.conversion.engines import gguf_note
from longext.conversion.extend import bare_spec, new_spec
from longext.errors import CheckpointError, ConfigError
from longext.rope.reading import spec_from_json
from longext.rope.spec import ROPE_METHODS, RopeSpec, rope_parameters
from longext.settings import shown_name
from longext.staging import staged_file
from longext.untrusted import fields, parse_json

RECORD_KEY = "longext.extension"  # what longext notes in a file that it wrote; engines pass over it
_RECORD = {
    **{"origin": dict, "spec": dict, "rope_parameters": dict, "new_length": int},
    **{"base_model": str, "base_path": str},
}


@dataclass(frozen=True, kw_only=True)
class GgufPlan:
    """Everything `extend` is going to do to a GGUF file.

    Attributes:
        file: the file as it is.
        rope: its RoPE.
        origin: the RoPE of the weights as they were trained.
        spec: the new RoPE.
        new_length: the context length the extension is for.
        change: the keys and tensors that carry it.
        notes: which engines read it.
    """

    config: ExtendConfig
    file: GgufFile
    rope: ModelRope
    origin: RopeSpec
    spec: RopeSpec
    new_length: int
    change: GgufRope
    notes: tuple[str, ...] = ()

    @property
    def data_bytes(self) -> int:
        """Return the bytes of weights that are copied."""
        return self.file.data_end - self.file.data_start


def plan_gguf(config: ExtendConfig) -> GgufPlan:
    """Work out the extension of a GGUF file from its header.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: it has a scaled RoPE already, a parameter is out of range, or llama.cpp cannot compute the method.
    """
    if elsewhere := no_checkpoint(config.method):
        raise ConfigError(elsewhere)
    ROPE_METHODS[config.method]
    if config.copy:
        raise ConfigError("--copy is for checkpoints; a .gguf is always copied.")
    file = read_gguf(Path(config.model).expanduser())
    rope = read_gguf_rope(file)
    origin = _origin(config, file, rope)
    spec = new_spec(config, origin)
    new_length = round(spec.original_max_position_embeddings * spec.factor)
    return GgufPlan(
        config=config,
        file=file,
        rope=rope,
        origin=origin,
        spec=spec,
        new_length=new_length,
        change=gguf_rope(file, spec, new_length),
        notes=(gguf_note(),),
    )


def _origin(config: ExtendConfig, file: GgufFile, rope: ModelRope) -> RopeSpec:
    """Return the RoPE that the weights were trained with, which nothing may have scaled."""
    if any(name in file.tensors for name in (FREQS, "rope_factors_long.weight")):
        raise ConfigError(
            f"{config.model} holds factors of single frequencies ({FREQS}), which longext cannot take out of a file: "
            "extend the file or checkpoint that it was made from."
        )
    record = read_record(file)
    origin = spec_from_json(record["origin"]) if record else rope.spec
    if record and origin != spec_from_json(record["spec"]) and not config.replace:
        raise ConfigError(
            f"{config.model} was extended by longext already ({record['spec']['method']}, factor "
            f"{record['spec']['factor']:g}): extend the file it was made from, or start from that RoPE with --replace."
        )
    if origin.method != "none" and not config.replace:
        raise ConfigError(
            f"{config.model} has a scaled RoPE already ({origin.method}, factor {origin.factor:g} of "
            f"{origin.original_max_position_embeddings} tokens). Extend the file it was made from, or start from the "
            "bare base theta with --replace."
        )
    origin = bare_spec(origin)
    if config.original_length is None:
        return origin
    if config.original_length < 1:
        raise ConfigError(f"`original_length` must be >= 1, got {config.original_length}.")
    return dataclasses.replace(origin, original_max_position_embeddings=config.original_length)


def read_record(file: GgufFile) -> dict[str, Any]:
    """Return what longext noted in a file that it wrote, an empty dict for another's.

    Raises:
        CheckpointError: the note is broken.
    """
    text = file.values.get(RECORD_KEY)
    if not isinstance(text, str):
        return {}
    record: dict[str, Any] = parse_json(text, f"{file.path}: {RECORD_KEY}", CheckpointError, want=dict)
    fields(record, f"{file.path}: {RECORD_KEY}", _RECORD, CheckpointError, "Make the file again.")
    return record


def provenance(plan: GgufPlan) -> dict[str, Any]:
    """Return what `verify` and a later `extend` need to know."""
    return extension_record(
        base_model=shown_name(plan.config.model),
        base_path=path_from(Path(plan.config.named_output), plan.file.path),
        origin=plan.origin,
        spec=plan.spec,
        old_length=plan.rope.max_position_embeddings,
        new_length=plan.new_length,
    )


def path_from(output: Path, base: Path) -> str:
    """Return where `base` is, seen from the folder of `output`; its name alone if the way goes through a home."""
    base, folder = base.resolve(), output.resolve().parent
    with contextlib.suppress(ValueError):  # another drive
        if Path(os.path.commonpath([base, folder])) not in Path.home().resolve().parents:
            return os.path.relpath(base, folder)
    return base.name


def extension_record(
    *, base_model: str, base_path: str, origin: RopeSpec, spec: RopeSpec, old_length: int, new_length: int
) -> dict[str, Any]:
    """Return the note on an extension that a GGUF file carries."""
    return {
        "longext": longext.__version__,
        "base_model": base_model,
        "base_path": base_path,
        "origin": dataclasses.asdict(origin),
        "spec": dataclasses.asdict(spec),
        "rope_parameters": rope_parameters(spec),
        "old_length": old_length,
        "new_length": new_length,
        "formula": ROPE_METHODS[spec.method].formula,
        "reference": ROPE_METHODS[spec.method].reference,
    }


def record_value(record: dict[str, Any]) -> Value:
    """Return a note as the value of a key."""
    return STRING, json.dumps(record, sort_keys=True)


def extend_gguf(config: ExtendConfig, on_progress: Callable[[int], None] | None = None) -> GgufPlan:
    """Write the extended file to `config.output` and return what was done; it appears only when it is complete.

    Args:
        on_progress: called with the bytes just written.

    Raises:
        ConfigError, CheckpointError: as `plan_gguf`; or the output exists.
    """
    plan = plan_gguf(config)
    keys = {**plan.change.keys, RECORD_KEY: record_value(provenance(plan))}
    with gguf_output(Path(config.named_output), config.force, plan.file.path) as unfinished:
        write_changed(plan.file, unfinished, keys, plan.change.tensors, on_progress)
    return plan


@contextlib.contextmanager
def gguf_output(output: Path, force: bool, source: Path) -> Iterator[Path]:
    """Yield the name to write a .gguf under; it becomes `output` when the block is left without an error.

    Raises:
        ConfigError: `output` is no name of such a file, is what is read, or exists and may not be replaced.
    """
    check_gguf_output(output, force, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(output) as unfinished:
        yield unfinished


def check_gguf_output(output: Path, force: bool, source: Path) -> None:
    """Raise ConfigError if `output` may not be written."""
    if not is_gguf(output):
        raise ConfigError(f"The output {output} must be a file whose name ends in .gguf. Choose another -o.")
    if not output.exists():
        return
    if output.samefile(source):
        raise ConfigError(f"The output {output} is the model itself. Choose another -o.")
    if not force:
        raise ConfigError(f"The output {output} already exists. Choose another -o, or add --force to replace it.")
    with contextlib.suppress(CheckpointError):
        if read_gguf(output).values.get(RECORD_KEY):
            return
    raise ConfigError(
        f"The output {output} exists and was not written by longext, so --force will not delete it. Choose another -o."
    )
