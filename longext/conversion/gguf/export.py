"""A checkpoint as a GGUF file: Llama, Qwen2 and Qwen3, with the RoPE that longext wrote; weights one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.checkpoint.gguf_rope import GgufRope, rope_for
from longext.checkpoint.load import load_config
from longext.checkpoint.rope_config import ModelRope, read_model_rope
from longext.checkpoint.source import read_config, resolve_model
from longext.checkpoint.weights import TORCH_NAMES, StoredTensor, read_shards, tensors_of
from longext.conversion.config import ExportConfig
from longext.conversion.extend import trained_rope, written_rope
from longext.conversion.gguf.extend import (
    RECORD_KEY,
    check_gguf_output,
    extension_record,
    gguf_output,
    path_from,
    record_value,
)
from longext.conversion.gguf.tokenizer import CONVERTER, GgufTokenizer, gguf_tokenizer
from longext.errors import CheckpointError, ConfigError
from longext.extras import require
from longext.rope.spec import RopeSpec
from longext.settings import shown_name

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # transformers' name -> llama.cpp's
DTYPES = ("auto", "float32", "float16", "bfloat16")
_PASSED_OVER = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything `export gguf` is going to do.

    Attributes:
        text: the config of the text model, defaults filled in by transformers.
        spec, origin: its RoPE, and that of its training.
        change: the keys and tensors that carry it.
        tensors: the stored tensor behind each name of the file.
    """

    config: ExportConfig
    source: Path
    architecture: str
    text: Any
    rope: ModelRope
    spec: RopeSpec
    origin: RopeSpec
    change: GgufRope
    tokenizer: GgufTokenizer
    tensors: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Return the size of the weights as they are stored."""
        return sum(each.end - each.start for each in self.tensors.values())


def gguf_package() -> Any:
    """Return the package gguf (MissingExtraError: it is not installed)."""
    require("Writing .gguf", ["gguf"])
    import gguf

    return gguf


def plan_export(config: ExportConfig) -> ExportPlan:
    """Read what a checkpoint is, and find what llama.cpp calls it.

    Raises:
        CheckpointError: it cannot be read, or is of an architecture or tokenizer that longext does not export.
        ConfigError: llama.cpp cannot compute its RoPE.
        MissingExtraError: the package gguf is not installed.
    """
    if config.format != "gguf":
        raise ConfigError(f"longext export writes gguf, got '{config.format}'.")
    if config.dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got '{config.dtype}'.")
    gguf_package()
    source = resolve_model(config.model, config.revision)
    shards = read_shards(source)
    rope = read_model_rope(source)
    architecture = ARCHITECTURES.get(rope.model_type)
    text = load_config(source).get_text_config()
    problem = _unlike(text, rope, read_config(source)) if architecture else f"of type {rope.model_type}"
    if architecture is None or problem:
        raise CheckpointError(f"{config.model} is {problem}; longext exports Llama, Qwen2 and Qwen3. Run {CONVERTER}.")
    spec = written_rope(source, rope)
    return ExportPlan(
        config=config,
        source=source,
        architecture=architecture,
        text=text,
        rope=rope,
        spec=spec,
        origin=trained_rope(source, rope)[0],
        change=rope_for(architecture, spec, rope.max_position_embeddings),
        tokenizer=gguf_tokenizer(source, text.vocab_size),
        tensors=_named(architecture, text.num_hidden_layers, tensors_of(shards)),
    )


def _unlike(text: Any, rope: ModelRope, config: dict[str, Any]) -> str:
    """Return what llama.cpp's graph does not compute of this model, "" if it computes all."""
    if config.get("quantization_config"):
        return "quantised"
    if rope.section or rope.local_parameters or rope.layer_theta or rope.unknown or rope.carried:
        return "a model with more than one RoPE, or keys of its own in it"
    if rope.sliding_window or rope.partial_rotary_factor != 1:
        return "a model with a sliding window, or heads that are rotated in part"
    if rope.model_type == "qwen2" and rope.head_dim * text.num_attention_heads != text.hidden_size:
        return "a Qwen2 model with heads of another size than hidden_size / num_attention_heads"
    if text.hidden_act != "silu":
        return f"a model with the activation {text.hidden_act}"
    return ""


def _named(architecture: str, num_layers: int, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    gguf = gguf_package()
    names = gguf.get_tensor_name_map(_architecture(architecture), num_layers)
    found = {}
    for name, tensor in sorted(stored.items()):
        if name.endswith(_PASSED_OVER):
            continue
        other = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if other is None or tensor.dtype not in TORCH_NAMES:
            raise CheckpointError(
                f"{tensor.path}: llama.cpp has no place for '{name}' ({tensor.dtype}) in '{architecture}'. Run "
                f"{CONVERTER}."
            )
        found[other] = tensor
    return found


def _architecture(name: str) -> Any:
    names: dict[Any, str] = gguf_package().MODEL_ARCH_NAMES
    return next(kind for kind, spelled in names.items() if spelled == name)


def export_gguf(config: ExportConfig, on_progress: Callable[[int], None] | None = None) -> ExportPlan:
    """Write `config.model` as a GGUF file and return what was done; it appears only when it is complete.

    Args:
        on_progress: called with the bytes of weights just written.

    Raises:
        CheckpointError, ConfigError: as `plan_export`; or the output exists.
    """
    output = Path(config.named_output)
    plan = plan_export(config)
    check_gguf_output(output, config.force, plan.source)
    gguf = gguf_package()
    with gguf_output(output, config.force, plan.source) as unfinished:
        writer = gguf.GGUFWriter(unfinished, plan.architecture)
        _add_keys(writer, plan, gguf)
        _add_tokenizer(writer, plan.tokenizer)
        for name, stored in plan.tensors.items():
            numpy_type, quantization = _types(gguf, _dtype(stored, config.dtype))
            size = math.prod(stored.shape) * numpy_type.itemsize
            writer.add_tensor_info(name, stored.shape, numpy_type, size, raw_dtype=quantization)
        for name, values in plan.change.tensors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values, size in _data(plan):
            writer.write_tensor_data(values)
            if on_progress:
                on_progress(size)
        for values in plan.change.tensors.values():
            writer.write_tensor_data(values)
        writer.close()
    return plan


def _add_keys(writer: Any, plan: ExportPlan, gguf: Any) -> None:
    text, kinds = plan.text, gguf.GGUFValueType
    writer.add_type("model")
    writer.add_name(shown_name(plan.config.model))
    writer.add_block_count(text.num_hidden_layers)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(plan.rope.head_dim)
    writer.add_value_length(plan.rope.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(plan.spec.rotary_dim)
    common = max(plan.tensors.values(), key=lambda each: each.end - each.start)
    types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[types[_dtype(common, plan.config.dtype)]])
    for name, value in plan.change.keys.items():
        if value is not None:
            writer.add_key_value(name, value[1], kinds(value[0]))
    record = extension_record(
        base_model=shown_name(plan.config.model),
        base_path=path_from(Path(plan.config.named_output), plan.source),
        origin=plan.origin,
        spec=plan.spec,
        old_length=plan.origin.original_max_position_embeddings,
        new_length=plan.rope.max_position_embeddings,
    )
    writer.add_string(RECORD_KEY, record_value(record)[1])


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    writer.add_token_merges(tokenizer.merges)
    for name, token in tokenizer.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(tokenizer.adds_bos)
    if tokenizer.template:
        writer.add_chat_template(tokenizer.template)


# --- weights ----------------------------------------------------------------------------------------------------------


def _dtype(stored: StoredTensor, wanted: str) -> str:
    """Return the type a tensor is written in: vectors (norms, biases) in float32, as llama.cpp needs them."""
    if len(stored.shape) < 2:
        return "float32"
    kind = TORCH_NAMES[stored.dtype] if wanted == "auto" else wanted
    return "float32" if kind == "float64" else kind


def _types(gguf: Any, kind: str) -> tuple[Any, Any]:
    """Return (NumPy's type of the array, ggml's type) of a type."""
    import numpy as np

    array, name = {"float32": (np.float32, "F32"), "float16": (np.float16, "F16"), "bfloat16": (np.uint16, "BF16")}[
        kind
    ]
    return np.dtype(array), gguf.GGMLQuantizationType[name]


def _data(plan: ExportPlan) -> Iterator[tuple[Any, int]]:
    """Yield each tensor as a NumPy array in its type, and the bytes that were read for it."""
    import torch

    heads = {"attn_q": plan.text.num_attention_heads, "attn_k": plan.text.num_key_value_heads}
    for name, stored in plan.tensors.items():
        tensor = stored.read()
        kind = name.split(".")[-2]
        if plan.architecture == "llama" and kind in heads:
            tensor = interleaved(tensor, heads[kind])
        tensor = tensor.to(getattr(torch, _dtype(stored, plan.config.dtype))).contiguous()
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{stored.path}: '{stored.name}' holds values that are not finite in {tensor.dtype}. If they are in "
                "the file, use --dtype bfloat16 or float32."
            )
        values = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        yield values, stored.end - stored.start


def interleaved(tensor: Any, num_heads: int) -> Any:
    """Return rows of a query or key projection (or its bias) as llama.cpp's llama graph pairs them.

    transformers rotates dimension i of a head with i + d/2, that graph 2i with 2i + 1.
    """
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
