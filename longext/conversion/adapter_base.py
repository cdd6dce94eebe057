"""What an adapter directory says of its base model and its RoPE: found and checked, and written.

PEFT records neither the RoPE of an adapter nor the weights it was trained on. longext writes both to its directory:
`run.json` and `config.json`, and once it is finished `base/`, the base model under that RoPE (its weights linked),
which `base_model_name_or_path` names.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from longext.checkpoint.bundled import BUNDLED_MODELS, is_bundled
from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import HUB_ID, read_config, read_json, resolve_model, text_of
from longext.checkpoint.weights import read_shards, same_weights, weight_index
from longext.conversion.adapter import ADAPTER_CONFIG
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import ExtensionPlan, provenance, trained_rope, written_rope
from longext.conversion.files import place_file, side_files, write_json
from longext.errors import CheckpointError
from longext.manifest import read_manifest, write_manifest
from longext.rope.reading import spec_from_json

BASE_DIRECTORY = "base"
_RUN_MARKER = "complete.json"  # training/checkpoints.py: a checkpoint of a longext run


# --- read -------------------------------------------------------------------------------------------------------------


def record_of(adapter: Path) -> tuple[dict[str, Any], Path | None]:
    """Return (longext's record of the extension, the directory whose config.json has the RoPE) of an adapter.

    They are in the directory itself; those of a checkpoint of a run may be in the run's.
    """
    homes = [adapter, adapter.resolve().parent.parent] if (adapter / _RUN_MARKER).is_file() else [adapter]
    for home in homes:
        record = read_manifest(home).get("extension") or {}
        if record or (home / "config.json").is_file():
            return record, home if (home / "config.json").is_file() else None
    return {}, None


def find_base(
    base: str | None, revision: str | None, adapter: Path, settings: dict[str, Any]
) -> tuple[str, str | None, Path]:
    """Return (name, revision, directory) of the base: the one given, else what run.json, then adapter_config.json name.

    Raises:
        CheckpointError: none of them is here; lists what was looked for.
    """
    if base is not None:
        return base, revision, resolve_model(base, revision)
    record, _ = record_of(adapter)
    for path in (record.get("base_path"), adapter / BASE_DIRECTORY):
        if path and Path(path).is_dir():
            return record.get("base_model") or str(path), record.get("base_revision"), Path(path)
    named = [
        (record.get("base_model"), record.get("base_revision")),
        (settings.get("base_model_name_or_path"), settings.get("revision")),
    ]
    for name, at in named:
        if name and (name in BUNDLED_MODELS or Path(name).is_dir()):
            return name, at, resolve_model(name)
    for name, at in named:
        if name and HUB_ID.match(name):
            return name, at, resolve_model(name, at)
    looked = " and ".join(f"'{name}'" for name in dict.fromkeys(name for name, _ in named if name)) or "no base"
    raise CheckpointError(
        f"The adapter {adapter} names {looked}, which is not here. Give its base with `longext merge --base MODEL`."
    )


def check_base_weights(adapter: Path, name: str, base: Path) -> None:
    """Raise CheckpointError if longext noted which weights the adapter was trained on, and these are others."""
    trained_on = record_of(adapter)[0].get("base_weights")
    if trained_on is not None and not same_weights(base, trained_on):
        raise CheckpointError(
            f"The adapter {adapter} was trained on other weights than those of {name}, though of the same shapes; a "
            "copy in other files or another dtype counts as other weights. Give the model it was trained on with "
            "`longext merge --base`."
        )


def plan_rope(
    adapter: Path, base: Path, request: ExtendConfig, *, base_is_given: bool, trust_remote_code: bool = False
) -> tuple[ExtensionPlan, dict[str, Any], Path, list[str]]:
    """Return the RoPE of an adapter as a trained extension of its base, its record, its config's directory, and notes.

    It is that of the config.json which belongs to the adapter, else the base's; longext's own record says which method
    and which origin it had.

    Args:
        base_is_given: the user named the base, and so its RoPE.

    Raises:
        CheckpointError: config.json and record differ, describe another base, or a checkpoint of a run has neither.
    """
    rope = read_model_rope(base, trust_remote_code)
    record, home = record_of(adapter)
    notes: list[str] = []
    if home is not None:
        _check_same_base(home, base)
        theirs = read_model_rope(home, trust_remote_code)
        spec = written_rope(home, theirs)
        if record and record.get("rope_parameters") != theirs.parameters:
            raise CheckpointError(
                f"{home}: config.json and run.json state different rope_parameters. Restore the config.json that "
                "was saved with the adapter, or remove run.json to go by config.json alone."
            )
    else:
        if not base_is_given:
            _check_rope_is_known(adapter, record)
        theirs, record = rope, {}
        spec = written_rope(base, rope)
        notes.append(
            f"The adapter has no config.json: the RoPE is the base's ({spec.method}, {rope.max_position_embeddings:,} "
            "tokens). If it was trained with another, extend the base first and give that with `longext merge --base`."
        )
    is_kept = theirs.parameters == rope.parameters
    plan = ExtensionPlan(
        config=dataclasses.replace(request, method=spec.method),
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
        is_checked=record.get("checked", request.check),
    )
    return plan, {**provenance(plan), "trained": True}, home or base, notes


def _check_rope_is_known(adapter: Path, record: dict[str, Any]) -> None:
    """Raise CheckpointError for what a longext run wrote and that has lost its RoPE: the base's would be another."""
    if record or (adapter / _RUN_MARKER).is_file():
        raise CheckpointError(
            f"{adapter} is of a longext run, but neither it nor the run's directory has the config.json with the RoPE "
            "it was trained for. Restore that, or give the base, extended in the same way, with `longext merge --base`."
        )


def _check_same_base(home: Path, base: Path) -> None:
    """Raise CheckpointError if the config.json of an adapter describes a model of other sizes than the base."""
    ours, theirs = (text_of(read_config(path)) for path in (home, base))
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise CheckpointError(
                f"{home / 'config.json'} says {key} {ours[key]}, the base {base} says {theirs[key]}: "
                "an adapter for another base. Give its own with `longext merge --base`."
            )


# --- write ------------------------------------------------------------------------------------------------------------


def describe_adapter(
    directory: Path,
    output: Path,
    command: str,
    request: Any,
    config: dict[str, Any],
    record: dict[str, Any],
    state: str,
) -> None:
    """Write what PEFT does not write of an adapter: config.json with its RoPE, run.json, and where its base will be.

    Args:
        output: the finished directory; its `base/` is what adapter_config.json names, so that PEFT and transformers
            find the right RoPE or nothing.
        command, request: the command that made it and its config.
        config: config.json of the model with the adapter's RoPE, in both spellings.
        record: the extension record.
        state: what run.json says of the run.
    """
    write_json(directory / "config.json", config)
    settings = read_json(directory / ADAPTER_CONFIG, "an adapter directory")
    named = {**settings, "base_model_name_or_path": str(output.resolve() / BASE_DIRECTORY), "revision": None}
    write_json(directory / ADAPTER_CONFIG, named)
    write_manifest(directory, command, request, state=state, extension=record)


def write_base(directory: Path, source: Path, config: dict[str, Any]) -> None:
    """Write `base/`, the base model under the adapter's RoPE, and links to its weights next to the adapter.

    With config.json and weights next to it, `AutoModelForCausalLM.from_pretrained` takes the directory for a model with
    an adapter in it, wherever it is; without, it would look for the base under its name and take that one's RoPE.
    Weights are hard links, symbolic ones across devices: nothing large is copied.
    """
    base = directory / BASE_DIRECTORY
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    write_json(base / "config.json", config)
    for file in [*source.glob("*.py"), *source.glob("generation_config.json")]:
        shutil.copyfile(file, base / file.name)
    for file in weight_files(source):
        _link(file, base / file.name)
        link = directory / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(Path(BASE_DIRECTORY, file.name))


def weight_files(source: Path) -> list[Path]:
    """Return the weight files of a model and their index."""
    index = weight_index(source)
    return [*([index] if index else []), *(shard.path for shard in read_shards(source))]


def _link(source: Path, target: Path) -> None:
    if is_bundled(source.parent):
        place_file(source, target, force_copy=True)
        return
    source = source.resolve()  # Hub caches hold symlinks to blobs
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)
