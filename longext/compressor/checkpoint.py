"""A trained compressor on disk: compressor.json (what it is, on which model) and compressor.safetensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint.checks import check_finite, check_tokens
from longext.checkpoint.load import MAPPED, first_line, load_causal_lm, load_tokenizer, resolve_device, resolve_dtype
from longext.checkpoint.rope_config import model_rope
from longext.checkpoint.source import read_config, resolve_model
from longext.checkpoint.weights import fingerprint_weights, read_header, same_weights
from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor, build_compressor
from longext.compressor.spec import CompressorSpec
from longext.errors import CheckpointError, ConfigError
from longext.models.hf import HFLanguageModel
from longext.options import RuntimeConfig
from longext.untrusted import fields, read_json

DESCRIPTION = "compressor.json"
WEIGHTS = "compressor.safetensors"
SCHEMA = "longext.compressor/1"
_FIELDS = {"spec": dict, "base_model": str, "base_revision": (str, None), "base_weights": str, "window": int}


@dataclass(frozen=True)
class BaseModel:
    """The model a compressor belongs to.

    Attributes:
        name: as the user named it; a directory is made absolute.
        revision: of a Hub id.
        directory: its files on this machine.
        weights: what tells its weights and RoPE from others: the fingerprint of both, joined by a hyphen.
    """

    name: str
    revision: str | None
    directory: Path
    weights: str

    def is_that_of(self, recorded: str) -> bool:
        """True if this is the model whose `weights` were recorded (by longext 0.1 too)."""
        rope = recorded.rpartition("-")[2]
        return rope == self.weights.rpartition("-")[2] and self.has_weights_of(recorded)

    def has_weights_of(self, recorded: str) -> bool:
        """True if its weights are those of the model whose `weights` were recorded, whatever its RoPE and length."""
        fingerprint = recorded.rpartition("-")[0]
        return fingerprint == self.weights.rpartition("-")[0] or same_weights(self.directory, fingerprint)


def find_base(name: str, revision: str | None = None) -> BaseModel:
    """Return the base model called `name` (CheckpointError if there is none)."""
    directory = resolve_model(name, revision)
    path = Path(name).expanduser()
    rope = model_rope(read_config(directory), directory)
    turned = json.dumps([rope.parameters, rope.max_position_embeddings], sort_keys=True)
    weights = f"{fingerprint_weights(directory)}-{hashlib.sha256(turned.encode()).hexdigest()[:8]}"
    return BaseModel(str(path.resolve()) if path.is_dir() else name, revision, directory, weights)


def save_compressor(directory: Path, compressor: Compressor, base: BaseModel) -> None:
    """Write the two files of a compressor; parameters in float32."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in compressor.state_dict().items()}
    save_file(state, directory / WEIGHTS)
    describe_compressor(directory, compressor, base)


def describe_compressor(directory: Path, compressor: Compressor, base: BaseModel) -> None:
    """Write compressor.json beside weights that are there."""
    description = {
        "schema": SCHEMA,
        "spec": compressor.spec.to_json(),
        "base_model": base.name,
        "base_revision": base.revision,
        "base_weights": base.weights,
        "window": compressor.backbone.window,
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_compressor(directory: str | Path) -> bool:
    """True for a directory that holds a trained compressor."""
    return (Path(directory).expanduser() / DESCRIPTION).is_file()


def check_base_options(config: RuntimeConfig) -> None:
    """Raise ConfigError for options of a plain model if `config.model` is a compressor's directory."""
    options = {"`revision`": config.revision, "`trust_remote_code`": config.trust_remote_code or None}
    wrong = ", ".join(name for name, value in options.items() if value is not None)
    if wrong:
        raise ConfigError(
            f"{config.model} is a trained compressor, which takes no {wrong}: it names its own model, or `base` does."
        )


def read_description(directory: Path) -> dict[str, Any]:
    """Return what compressor.json says.

    Raises:
        CheckpointError: there is none, or it is not of this schema.
    """
    advice = "Give the -o directory of `longext compress-train`."
    path = directory / DESCRIPTION
    try:
        value: dict[str, Any] = read_json(path, CheckpointError, want=dict, advice=advice, keep_surrogates=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no trained compressor: it has no {DESCRIPTION}. {advice}") from error
    if value.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is no trained compressor: its `schema` is not {SCHEMA}. {advice}")
    CompressorSpec.from_json(value.get("spec"), f"{path}: spec")
    return {**value, **fields(value, str(path), _FIELDS, CheckpointError, advice)}


def load_backbone(
    base: BaseModel,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    loss_chunk: int = 4096,
) -> tuple[Backbone, Any]:
    """Return (backbone, tokenizer) of the base model, ready for memories.

    Raises:
        CheckpointError: it cannot be loaded, or its tokenizer is another model's.
        ConfigError: memories cannot be put into it.
    """
    if device == MAPPED:
        raise ConfigError("Memories need the model on one device: use --device auto, cpu, cuda, cuda:N or mps.")
    place = resolve_device(device)
    tokenizer = load_tokenizer(base.directory)
    model = load_causal_lm(
        base.directory, dtype=resolve_dtype(dtype, place), device=place, attention=attention or _attention(base)
    )
    check_tokens(tokenizer, model, base.directory)
    return Backbone(model, loss_chunk), tokenizer


def _attention(base: BaseModel) -> str | None:
    """Return eager for families that cap attention scores, which SDPA cannot; else transformers' choice."""
    config = read_config(base.directory)
    text = config.get("text_config", config)
    return "eager" if text.get("attn_logit_softcapping") else None


@dataclass(frozen=True)
class LoadedCompressor:
    """A compressor ready for use, with its tokenizer and where it came from."""

    compressor: Compressor
    tokenizer: Any
    base: BaseModel
    directory: Path

    @property
    def plain(self) -> HFLanguageModel:
        """The base model by itself, sharing the weights."""
        model = self.compressor.backbone.model
        return HFLanguageModel(
            self.base.name, model, self.tokenizer, read_config(self.base.directory), self.base.directory
        )


def load_compressor(
    directory: str | Path,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
) -> LoadedCompressor:
    """Load a trained compressor and the model it belongs to.

    Args:
        base: that model's directory now, if it has moved since training.

    Raises:
        CheckpointError: no compressor there, its model is missing, or is another than it was trained on.
    """
    folder = Path(directory).expanduser()
    description = read_description(folder)
    model = find_base(base or description["base_model"], None if base else description["base_revision"])
    if not model.is_that_of(description["base_weights"]):
        raise CheckpointError(
            f"{folder} was trained on other weights, or another RoPE, than {model.directory} has (a compressor fits "
            f"only the model it was trained on: {description['base_model']}). Give that model."
        )
    backbone, tokenizer = load_backbone(model, device=device, dtype=dtype, attention=attention)
    compressor = build_compressor(backbone, CompressorSpec.from_json(description["spec"]))
    load_state(compressor, folder)
    return LoadedCompressor(compressor.eval(), tokenizer, model, folder)


def load_state(compressor: Compressor, directory: Path) -> None:
    """Read the weights in `directory` into `compressor`.

    Raises:
        CheckpointError: they are missing, of other shapes or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        read_header(directory / WEIGHTS, advice="Train the compressor again, or restore the file.")
        state = load_file(directory / WEIGHTS)
        compressor.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} does not fit this compressor: {first_line(error)}") from error
    check_finite(compressor, directory)
    compressor.to(torch.promote_types(compressor.backbone.dtype, torch.float32)).to(compressor.backbone.device)
