"""The model of a training run: the base checkpoint under its new RoPE, ready to be trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from longext.attention.bands import is_remap
from longext.attention.shifted import check_model, register_attention
from longext.attention.variant import ATTENTION_VARIANTS
from longext.checkpoint.checks import check_tokens
from longext.checkpoint.load import build_model_config, load_causal_lm, load_tokenizer, resolve_device
from longext.checkpoint.rope_config import model_rope, write_rope
from longext.checkpoint.source import read_config, resolve_model
from longext.checkpoint.weights import fingerprint_weights
from longext.conversion.config import ExtendConfig
from longext.conversion.engines import engine_notes
from longext.conversion.extend import (
    ExtensionPlan,
    checked,
    exportable_parameters,
    extended_config,
    plan_extension,
    provenance,
)
from longext.errors import ConfigError
from longext.manifest import read_manifest
from longext.models.methods import RemapRequest, remap_request
from longext.models.remap import IMPLEMENTATION
from longext.models.rotary import LENGTH_DEPENDENT
from longext.options import RopeConfig, RuntimeConfig
from longext.processes.group import is_main_process, local_rank
from longext.rope.spec import ROPE_METHODS
from longext.rope.windows import join_windows
from longext.training.config import TUNINGS, FinetuneConfig
from longext.training.layers.rematerialise import Rematerialisation
from longext.training.layers.transfer import Transfer
from longext.training.sweep import OFF
from longext.training.tuning import norm_modules, quantisation
from longext.untrusted import note


@dataclass(frozen=True)
class Extension:
    """What the run trains for.

    Attributes:
        source: directory of the base model.
        config: config.json with the RoPE to train with, in both spellings.
        record: the provenance that run.json keeps under "extension".
        target_length: tokens the trained model is for.
        trained_length: tokens it was pre-trained on.
    """

    source: Path
    config: dict[str, Any]
    record: dict[str, Any]
    target_length: int
    trained_length: int
    remap: RemapRequest | None = None

    @property
    def rope_type(self) -> str:
        """The rope_type of the config (of its full-attention layers)."""
        return model_rope(self.config, self.source).rope_type

    @property
    def follows_length(self) -> bool:
        """True if the frequencies depend on the length of the sequence."""
        parameters = model_rope(self.config, self.source).parameters
        is_one = self.rope_type == "longrope" and parameters["short_factor"] == parameters["long_factor"]
        return self.rope_type in LENGTH_DEPENDENT and not is_one


def plan_training_rope(config: FinetuneConfig) -> Extension:
    """Work out the RoPE of the run from config files alone.

    Raises:
        ConfigError: a target length that the model does not reach without a method, or a method's own complaint.
        CheckpointError: the model cannot be read.
    """
    source = resolve_model(config.model, config.revision)
    rope = {field.name: getattr(config, field.name) for field in fields(RopeConfig)}
    remap = remap_request(config.method, config.factor, config.target_length)
    if config.method == "none" or remap:
        return _as_it_is(config, source, remap)
    request = ExtendConfig(model=config.model, method=config.method, revision=config.revision, **rope)
    plan = _plan_windows(request) if config.mixed_window else plan_extension(request)
    record = {**provenance(plan), "trained": True, "base_weights": fingerprint_weights(source)}
    original = plan.spec.original_max_position_embeddings
    return Extension(source, extended_config(plan), record, plan.new_length, original)


def _plan_windows(request: ExtendConfig) -> ExtensionPlan:
    """Return an extension under which texts of up to the trained length keep the RoPE of the weights."""
    plan = plan_extension(replace(request, check=False))
    spec = join_windows(plan.origin, plan.spec, plan.new_length)
    parameters = exportable_parameters(plan.rope, spec)
    return checked(replace(plan, config=request, spec=spec, parameters=parameters, warnings=engine_notes(parameters)))


def _as_it_is(config: FinetuneConfig, source: Path, remap: RemapRequest | None) -> Extension:
    raw = read_config(source)
    rope = model_rope(raw, source, config.trust_remote_code or None)
    if config.mixed_window and rope.spec.method != "longrope":
        raise ConfigError(
            f"--mixed-window trains two RoPEs, and {config.model} has one ({rope.rope_type}): add --method (yarn, ...) "
            "or give a checkpoint whose RoPE is longrope."
        )
    if remap is not None:
        remap = replace(remap, original_length=remap.original_length or rope.max_position_embeddings)
        length = remap.target(remap.original_length or 0)
    else:
        length = config.target_length or rope.max_position_embeddings
    if remap is None and length > rope.max_position_embeddings and rope.rope_type != "dynamic":
        raise ConfigError(
            f"--target-length {length} is beyond the {rope.max_position_embeddings} tokens of {config.model}: "
            "add --method (linear, ntk, yarn, ...) to extend it."
        ).about("method")
    method = ROPE_METHODS[rope.spec.method]
    read = {
        "base_revision": config.revision,
        "relation": "keeps",
        "origin": asdict(rope.spec),
        "spec": asdict(rope.spec),
        "old_rope_parameters": rope.parameters,
        "old_length": rope.max_position_embeddings,
        "new_length": rope.max_position_embeddings,
        "formula": method.formula,
        "reference": method.reference,
    }
    record = {
        **read,
        **(read_manifest(source).get("extension") or {}),
        "base_model": config.model,
        "base_path": str(source.resolve()),
        "rope_parameters": rope.parameters,
        "base_weights": fingerprint_weights(source),
        "trained": True,
    }
    both = write_rope(raw, rope, rope.spec, rope.parameters, rope.max_position_embeddings)  # in both spellings
    if remap is not None:
        record["remapping"] = asdict(remap)
    return Extension(source, both, record, length, rope.spec.original_max_position_embeddings, remap)


def load_for_training(config: FinetuneConfig, extension: Extension) -> tuple[Any, Any]:
    """Return (model, tokenizer): weights as trained, the new RoPE, the attention variant switched on.

    Frozen weights are in `config.dtype` ("auto": float32 on a CPU, bfloat16 on a GPU).

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded, or do not fit each other.
    """
    register_attention()
    device = training_device(config)
    quantised = quantisation(config.quantize)
    tokenizer = load_tokenizer(extension.source, config.trust_remote_code or None)
    model = load_causal_lm(
        extension.source,
        config=build_model_config(extension.config),
        dtype=training_dtype(config, device),
        attention=implementation_of(config),
        trust_remote_code=config.trust_remote_code or None,
        quantization=quantised,
        device_map={"": device} if quantised is not None else None,
    )
    check_tokens(tokenizer, model, extension.source)
    model.config.use_cache = False
    if config.context_parallel == 1:
        whole = check_model(model, swept=config.sweep != OFF, shared=config.sequence_parallel > 1)
        if attention_of(config) != "full" and not whole and is_main_process():
            note(
                f"Every layer of {config.model} has a sliding window, which training keeps: {attention_of(config)} "
                "attention groups none of them, and the run is that of --attention full."
            )
    return model, tokenizer


def implementation_of(config: FinetuneConfig) -> str:
    """Return the attn_implementation to train with: our variant, or sdpa under accelerate's context parallelism."""
    if config.context_parallel > 1:
        return "sdpa"
    return ATTENTION_VARIANTS[attention_of(config)].implementation


def attention_of(config: FinetuneConfig) -> str:
    """Return the attention variant to train with: S2-Attn if nothing is said, full for PoSE and under a remapping."""
    is_full = config.positions == "pose" or is_remap(config.method)
    return config.attention or ("full" if is_full else "s2")


def training_device(config: RuntimeConfig) -> torch.device:
    """Return this process's device: with several processes, one CUDA device each."""
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", local_rank())
    return device


def training_dtype(config: FinetuneConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen weights; full fine-tuning keeps float32 master weights and computes in bfloat16.

    Raises:
        ConfigError: unknown name; float16, whose gradients would need loss scaling.
    """
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"--dtype for training must be auto, float32 or bfloat16, got '{config.dtype}'.")
    if config.dtype == "float32" or not TUNINGS[config.tuning].lora:
        return torch.float32
    return torch.bfloat16 if uses_autocast(config, device) else torch.float32


def uses_autocast(config: FinetuneConfig, device: torch.device) -> bool:
    """True if matrix products run in bfloat16."""
    return config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")


def narrow_hidden_states(model: Any) -> None:
    """Under autocast, hand the output of the embedding and of every norm of the decoder on in bfloat16.

    A trained embedding is float32, autocast leaves residual sums alone, and so every stored hidden state would take
    twice the memory that a bfloat16 model needs. A trained norm is float32 too, and so would be its output: what is
    kept for the projections behind it, and the queries and keys that flash-attn is handed. The weights, and what a norm
    computes inside, stay float32.
    """

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        kind = output.device.type
        return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output

    model.get_input_embeddings().register_forward_hook(hook)
    for name in norm_modules(model):
        model.get_submodule(name).register_forward_hook(hook)


def enable_checkpointing(model: Any, offload: bool, *, every: int = 1, nested: int = 1) -> None:
    """Compute decoder layers again in the backward pass, through transformers' own checkpointing.

    Args:
        offload: the kept inputs of layers wait in pinned CPU memory (CUDA).
        every: the first of so many layers is computed again, the others keep their activations.
        nested: so many layers in a row keep one input between them (`training.layers.rematerialise`).
    """
    # transformers renamed the method between 5.17 and 5.23; both take the same arguments
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False}, every_n_layers=every)
    if offload or nested > 1:
        function = Rematerialisation(Transfer() if offload else None, nested)
        model._set_gradient_checkpointing(True, function, every)


@contextlib.contextmanager
def full_attention(model: Any, device: torch.device, autocast: bool) -> Iterator[None]:
    """Put `model` into eval mode under transformers' own full attention; undone on leaving.

    A model that trains under a remapping of positions is used under it too, and stays there.
    Families that have no SDPA, as those that cap attention scores (Gemma 2), get eager.
    """
    trained_with = model.config.get_text_config()._attn_implementation
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    has_sdpa = not capped and getattr(model, "_supports_sdpa", True)
    was_training = model.training
    if trained_with != IMPLEMENTATION:
        model.set_attn_implementation("sdpa" if has_sdpa else "eager")
    model.eval()
    # compiled modules are for the rows that are trained on: other lengths would be compiled one by one
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    stance = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    # what every report says: no evaluation runs on a training variant
    assert model.config.get_text_config()._attn_implementation in ("sdpa", "eager", IMPLEMENTATION)
    try:
        with stance, torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        model.set_attn_implementation(trained_with)
        model.train(was_training)
