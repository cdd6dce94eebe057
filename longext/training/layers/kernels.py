"""Fused kernels for norms, RoPE and MLPs: Liger's through transformers' own switch, or what torch.compile makes.

Liger binds its methods to the modules of the model, and replaces classes and the RoPE function of the model's source
file for the whole process. Only the first stays: what was replaced is put back, and the RoPE function is in its place
while a run trains.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from longext.errors import ConfigError
from longext.extras import has, require

NO_KERNELS = "none"
# an activation that Liger's fused MLP computes, whatever the config says -> the switch it is behind
_FUSED_MLPS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}


def choose_kernels(asked: str, model_type: str, device: torch.device, sharded: bool) -> str | None:
    """Return which kernels a run uses: "liger", "compile" or None.

    Args:
        asked: one of `training.config.KERNELS`; auto is Liger where it is installed, knows the model and has CUDA.
        sharded: weights are divided over processes (FSDP, DeepSpeed), where Liger has not been tried.

    Raises:
        ConfigError: Liger was asked for and cannot be used.
        MissingExtraError: it is not installed.
    """
    if asked in ("none", "compile"):
        return asked if asked == "compile" else None
    installed = has("liger_kernel")
    if asked == "auto":
        usable = device.type == "cuda" and not sharded and installed
        return "liger" if usable and model_type in _known_to_liger() else None
    if device.type != "cuda":
        raise ConfigError(f"--kernels liger needs a CUDA device, this run is on {device.type}: use auto or none.")
    require("--kernels liger", ["liger"])
    if sharded:
        raise ConfigError("--kernels liger has not been tried under FSDP or DeepSpeed: use --kernels auto or none.")
    if model_type not in _known_to_liger():
        raise ConfigError(f"Liger {_version()} has no kernels for {model_type} models: use --kernels auto or none.")
    return "liger"


def _known_to_liger() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import (  # type: ignore[import-not-found,unused-ignore]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    known: dict[str, Any] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return known


def _version() -> str:
    return importlib.metadata.version("liger-kernel")


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model.

    Attributes:
        name: what is recorded.
        replaced: module of Python -> names in it -> what stands there while the run trains.
    """

    name: str = NO_KERNELS
    replaced: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the replaced functions in; undone on leaving."""
        before = {module: {name: vars(sys.modules[module])[name] for name in new} for module, new in self._items()}
        try:
            for module, new in self._items():
                vars(sys.modules[module]).update(new)
            yield
        finally:
            for module, old in before.items():
                vars(sys.modules[module]).update(old)

    def _items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self.replaced.items()


def use_liger(model: Any) -> Kernels:
    """Switch Liger's kernels on for the modules of a model; PEFT wraps them only afterwards.

    The loss is left to longext, which makes no logits. An MLP with another activation than the fused one keeps its own.

    Raises:
        ConfigError: Liger has none for this model.
    """
    from transformers.integrations.liger import apply_liger_kernel

    known, model_type = _known_to_liger(), model.config.model_type
    if model_type not in known:
        raise ConfigError(f"Liger {_version()} has no kernels for {model_type} models: use --kernels auto or none.")
    text = model.config.get_text_config()
    activation = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    wanted = {
        "rope": True,
        "rms_norm": True,
        **{name: activation in fused for name, fused in _FUSED_MLPS.items()},
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    taken = inspect.signature(known[model_type]).parameters
    source = inspect.getmodule(type(model))
    assert source is not None
    before = dict(vars(source))
    apply_liger_kernel(model, wanted)
    changed = {name: new for name, new in vars(source).items() if name in before and before[name] is not new}
    vars(source).update({name: before[name] for name in changed})
    functions = {name: new for name, new in changed.items() if not isinstance(before[name], type)}
    used = sorted(name for name, on in wanted.items() if on and name in taken)
    return Kernels(f"liger {_version()}: {', '.join(used)}", {source.__name__: functions} if functions else {})


def use_compile(model: Any, names: list[str]) -> Kernels:
    """Compile these modules in place with torch.compile, for one length of rows at a time.

    Whole layers are left alone: attention takes plans and kernels that break a graph. With all hooks on them already,
    norms with narrowed outputs compile to one kernel.
    """
    for name in names:
        model.get_submodule(name).compile(dynamic=False)
    return Kernels(f"torch.compile {torch.__version__}: MLPs and norms")
