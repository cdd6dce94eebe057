"""What the model of a config computes as RoPE, measured on a model built by plain transformers without its weights.

Imports nothing of longext, so that `_reload.py` can use it in a clean process. The model lives on the meta device: no
memory, no numbers. One forward pass there says which layers rotate and with which rotary module (autograd knows what
depends on cos and sin), how far each layer sees and its softmax scale (the attention interface gets both). Rotary
modules hold no weights, so they are built once more on the CPU and run.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

_PROBE = "longext_rope_probe"
_NUM_TOKENS = 4
_SMALL = 2**26  # bytes of float32 weights up to which the model runs with zeros on the CPU: ten times as fast


class NotBuilt(Exception):
    """transformers cannot build the model of a config, or run it on the meta device; says why in one line."""


def load_config(values: dict[str, Any]) -> Any:
    """Return the transformers config of a parsed config.json, read as `from_pretrained` would read the file."""
    with tempfile.TemporaryDirectory(prefix="longext-config-") as scratch:
        Path(scratch, "config.json").write_text(json.dumps(values), encoding="utf-8")
        return AutoConfig.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)


def auto_class(config: Any) -> Any:
    """Return the auto class that loads a checkpoint of `config`: causal LM if there is one, else image-text."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM  # its error names what it knows


def build(config: Any, attention: str | None = None) -> Any:
    """Return the model of `config` on the meta device, in eval mode, its parameters without gradients."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model = auto_class(config).from_config(config, **chosen)
    return model.eval().requires_grad_(False)


# --- rotary modules ---------------------------------------------------------------------------------------------------


def rotary_modules(model: Any) -> dict[str, Any]:
    """Return the rotary modules of the text model by name; those of vision towers have another config."""
    kind = model.config.get_text_config().model_type
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding")
        and getattr(getattr(module, "config", None), "model_type", None) == kind
    }


def layer_types(module: Any) -> list[str | None]:
    """Return the layer types for which a rotary module has frequencies of their own, or [None]."""
    kinds = getattr(module, "rope_type", None)
    return list(kinds) if isinstance(kinds, dict) else [None]


def frequencies(module: Any, kind: str | None, length: int) -> tuple[list[float], float]:
    """Return (inverse frequencies, factor on cos and sin) of a forward over `length` positions.

    Read out of cos and sin at position 1, in the order of the module's output; both halves of a head hold the same.
    """
    return rotation(type(module)(config=module.config), kind, length)


def rotation(module: Any, kind: str | None, length: int) -> tuple[list[float], float]:
    """Return the same of a module as it is; one that follows the length is changed by it."""
    cos, sin = (part[0] for part in cos_sin(module, kind, length))
    return torch.atan2(sin, cos).tolist(), float(torch.hypot(sin, cos).max())


def cos_sin(module: Any, kind: str | None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin at positions 1 and `length` - 1 as float64 [2, D] on the CPU.

    Modules with several position axes get the same on each.
    """
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    out = rotate(module, torch.tensor([[1, length - 1]], device=device), kind)
    cos, sin = (out.real, out.imag) if isinstance(out, torch.Tensor) else out[:2]
    cos, sin = (part.detach().cpu().double().reshape(-1, 2, part.shape[-1])[0] for part in (cos, sin))
    return cos, sin


def rotate(module: Any, positions: torch.Tensor, kind: str | None) -> Any:
    """Return what a rotary module makes of int64 positions [1, T], the same on each axis if it wants several."""
    extra = {"layer_type": kind} if kind else {}
    like, last = torch.zeros(1, positions.shape[1], 1, device=positions.device), None
    for axes in (None, 4, 3):
        ids = positions if axes is None else positions.expand(axes, *positions.shape)
        try:
            return module(like, ids, **extra)
        except Exception as error:  # a module that wants another number of axes raises what it likes
            last = error
    raise NotBuilt(f"{type(module).__name__}: {one_line(last)}")


# --- one forward on the meta device -----------------------------------------------------------------------------------


@dataclass
class Notes:
    """What one forward pass showed.

    Attributes:
        rotary: the outputs of the rotary modules (leaves of autograd's graph): name -> tensors.
        attention: what the attention interface was given, by name of the attention module.
        layers: for each decoder layer in order of its call, [name, names of the rotary modules it depends on].
    """

    rotary: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, list[str]] = field(default_factory=dict)


_active: list[tuple[Notes, dict[Any, str]]] = []  # the forward being watched; the interface takes no argument for it


def _watch_attention(module: Any, query: Any, key: Any, value: Any, *_: Any, **kwargs: Any) -> tuple[Any, None]:
    """An attention function that only notes its arguments; its output has the right shape and dependencies."""
    notes, names = _active[-1]
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    scaling = kwargs.get("scaling")
    notes.attention[names[module]] = {
        "scaling": scaling if isinstance(scaling, float) else getattr(module, "scaling", None),
        "window": window if isinstance(window, int) else None,
    }
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return query.new_zeros(shape) + 0 * (query.sum() + key.sum()), None


def _sources(tensor: Any, leaves: dict[int, str]) -> list[str]:
    """Names of the `leaves` (by id) that `tensor` was computed from, out of autograd's graph."""
    start = getattr(tensor, "grad_fn", None)
    sources, visited, waiting = set(), set(), [start] if start else []
    while waiting:
        node = waiting.pop()
        if node in visited:
            continue
        visited.add(node)
        if id(getattr(node, "variable", None)) in leaves:
            sources.add(leaves[id(node.variable)])
        waiting += [following for following, _ in node.next_functions if following is not None]
    return sorted(sources)


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _decoder_layers(decoder: nn.Module) -> dict[str, nn.Module]:
    """The longest list of modules in the text model: its layers."""
    lists = [(name, child) for name, child in decoder.named_modules() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise NotBuilt("no list of layers in it")
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    top = [(name, child) for name, child in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    name, chosen = max(top, key=lambda entry: (len(entry[1]) == count, len(entry[1])))
    return {f"{name}.{i}": layer for i, layer in enumerate(chosen)}


def _text_decoder(model: Any) -> Any:
    """The part of the model that takes `input_ids` and holds the decoder layers."""
    for candidate in (model.get_decoder() if hasattr(model, "get_decoder") else None, model.base_model, model):
        if candidate is not None and "input_ids" in inspect.signature(candidate.forward).parameters:
            return candidate
    raise NotBuilt("no text decoder in it")


def _hooks(decoder: Any, rotary: dict[str, Any], notes: Notes) -> None:
    """Make every rotary output a leaf, cut the graph in front of each layer, note what its output depends on."""

    def leave(name: str) -> Callable[..., Any]:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            kind = kwargs.get("layer_type") or next((arg for arg in args if isinstance(arg, str)), None)
            key = f"{name}:{kind}" if kind else name

            def leaf(tensor: torch.Tensor) -> torch.Tensor:
                new = tensor.detach().clone().requires_grad_()
                notes.rotary.setdefault(key, []).append(new)
                return new

            return _map_tensors(output, leaf)

        return hook

    def cut(_module: Any, args: Any, kwargs: Any) -> Any:
        rotations = {id(leaf) for leaves in notes.rotary.values() for leaf in leaves}

        def change(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if id(tensor) in rotations else tensor.detach()

        return _map_tensors(args, change), {key: _map_tensors(value, change) for key, value in kwargs.items()}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            leaves = {id(leaf): key for key, group in notes.rotary.items() for leaf in group}
            tensors = output if isinstance(output, tuple) else (output,)
            notes.layers[name] = sorted({key for tensor in tensors for key in _sources(tensor, leaves)})

        return hook

    for name, module in rotary.items():
        module.register_forward_hook(leave(name), with_kwargs=True)
        kinds = getattr(module, "rope_type", None)  # "default" never looks at the length, which has no value here
        module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    for name, layer in _decoder_layers(decoder).items():
        layer.register_forward_pre_hook(cut, with_kwargs=True)
        layer.register_forward_hook(note(name))


def _watch(model: Any, rotary: dict[str, Any]) -> tuple[Notes, str | None]:
    """Run the text model once on the meta device; return (what it showed, why it stopped early or None)."""
    AttentionInterface.register(_PROBE, _watch_attention)
    AttentionMaskInterface.register(_PROBE, lambda **_: None)
    notes = Notes()
    device = "cpu" if 4 * sum(weights.numel() for weights in model.parameters()) <= _SMALL else "meta"
    if device == "cpu":
        model = model.to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    else:
        model = model.to(torch.bfloat16)  # grouped matrix products of experts have no other meta kernel
    try:
        model.set_attn_implementation(_PROBE)
        decoder = _text_decoder(model)
        _hooks(decoder, rotary, notes)
        _active.append((notes, {module: name for name, module in decoder.named_modules()}))
        try:
            ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device=device)
            mask = torch.zeros(1, 1, _NUM_TOKENS, _NUM_TOKENS, device=device)  # one of four axes is used as it is
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            _active.pop()
    except Exception as error:  # code of any family may run in here; what stopped it is part of the answer
        return notes, one_line(error)
    return notes, None


# --- all of it --------------------------------------------------------------------------------------------------------


def _layer_facts(model: Any, notes: Notes, stopped: str | None) -> list[dict[str, Any]] | None:
    """One dict a layer: the rotary modules it uses, its window, its softmax scale; None if that is not known."""
    if stopped or not notes.layers:
        return None
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    facts = []
    for index, (name, rotary) in enumerate(notes.layers.items()):
        attention = [call for module, call in notes.attention.items() if module.startswith(f"{name}.")]
        kind = types[index] if index < len(types) and len(types) == len(notes.layers) else None
        windows = [call["window"] for call in attention]
        window = min(windows) if windows and None not in windows else None
        if kind == "chunked_attention":
            window = chunk
        facts.append({"kind": kind, "rotary": rotary, "window": window, "attends": bool(attention)})
    return facts


def _scales(model: Any) -> dict[str, float]:
    """The softmax scale of every attention module of the text model that holds one."""
    return {
        name: float(module.scaling)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), float) and "vision" not in name
    }


@torch.inference_mode(False)  # whatever the caller has switched off: without a graph no layer seems to rotate
@torch.enable_grad()
def measure(config: Any, lengths: list[int], layers: bool = True) -> dict[str, Any]:
    """Build the model of a transformers config and return what it computes (JSON values only).

    Args:
        lengths: sequence lengths at which every rotary module is run.
        layers: run the forward pass that tells what the layers do.

    Returns:
        {"model_class": its name, "rotary": {module or module:layer_type: {str(length): [frequencies, factor on cos
        and sin]}}, "layers": [{"kind", "rotary", "window", "attends"}] or None, "stopped": why the layers are not
        known or None, "scales": {attention module: softmax scale}}

    Raises:
        NotBuilt: transformers cannot build the model, or a rotary module cannot be run; one line.
    """
    try:
        model = build(config)
        rotary = rotary_modules(model)
        rotations: dict[str, dict[str, Any]] = {}
        for name, module in rotary.items():
            for kind in layer_types(module):
                key = f"{name}:{kind}" if kind else name
                rotations[key] = {str(length): frequencies(module, kind, length) for length in lengths}
    except NotBuilt:
        raise
    except Exception as error:  # constructors of any family
        raise NotBuilt(one_line(error)) from error
    scales = _scales(model)
    notes, stopped = _watch(model, rotary) if layers else (Notes(), "it was not run")
    return {
        "model_class": type(model).__name__,
        "rotary": rotations,
        "layers": _layer_facts(model, notes, stopped),
        "stopped": stopped,
        "scales": scales,
    }


def one_line(error: Exception | None) -> str:
    """Return an exception as one line: its kind and the last line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}" if lines else type(error).__name__
