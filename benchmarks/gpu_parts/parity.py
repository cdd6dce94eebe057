"""Numbers before speed: kernels against float32, and the gradients of every way to train against those of float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from gpu_parts.base import Measurement, NotAvailable, Setting, one_line, sdpa_backend
from gpu_parts.training import train

_LENGTH = 4096
# case -> (variant, query heads, key-value heads, documents, window)
CASES: dict[str, tuple[str, int, int, int, int | None]] = {
    "s2": ("s2", 8, 8, 1, None),
    "s2 gqa": ("s2", 8, 2, 1, None),
    "s2 packed": ("s2", 8, 8, 5, None),
    "full": ("full", 8, 8, 1, None),
    "full gqa": ("full", 8, 2, 1, None),
    "full packed": ("full", 8, 2, 5, None),
    "window": ("full", 8, 2, 1, 512),
}
# name -> options of `longext finetune` beside group 1,024
WAYS: dict[str, dict[str, Any]] = {
    "checkpointing": {},
    "no checkpointing": {"checkpointing": False},
    "sweep 1024": {"sweep": "1024"},
    "sweep 2048": {"sweep": "2048"},
    "kernels liger": {"kernels": "liger"},
    "kernels compile": {"kernels": "compile"},
    "tile 1024": {"tile": 1024},
    "nested 2": {"nested": 2},
    "checkpoint every 2": {"checkpoint_every": 2},
    "offload": {"offload": True},
    "sweep 1024 + liger + tile 512 + offload": {
        "sweep": "1024", "kernels": "liger", "tile": 512, "offload": True,
    },
}  # fmt: skip
_EVERYWHERE = ("checkpointing", "sweep 1024", "sweep 1024 + liger + tile 512 + offload")


def kernel_names() -> list[str]:
    """Return the kernels to look at: those behind torch's SDPA, then longext's other backends."""
    from longext.attention.backends import BACKENDS

    return ["flash (SDPA)", "cudnn (SDPA)", "efficient (SDPA)", *(name for name in BACKENDS if name != "sdpa")]


def attend(kernel: str, variant: str, layout: Any, group: int, window: int | None, *qkv: torch.Tensor) -> torch.Tensor:
    """Return longext's attention in training, [B, N, H, D], by one kernel.

    Raises:
        NotAvailable: the kernel is not here, or cannot do this.
    """
    from longext.attention.shifted import AttentionPlan, train_attention
    from longext.attention.variant import ATTENTION_VARIANTS
    from longext.errors import LongextError

    forced, is_sdpa = (kernel.partition(" ")[0], True) if "SDPA" in kernel else ("any", False)
    plan = AttentionPlan(layout, group, "sdpa" if is_sdpa else kernel)
    try:
        with sdpa_backend(forced):
            return train_attention(
                ATTENTION_VARIANTS[variant], plan, *qkv, qkv[0].shape[-1] ** -0.5, sliding_window=window
            )
    except (LongextError, NotImplementedError) as error:
        raise NotAvailable(one_line(error)) from error
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise NotAvailable(f"torch's SDPA has no {forced} kernel for this") from error
        raise


def attention(setting: Setting, kernel: str, case: str) -> dict[str, Any]:
    """Return relative errors of attention forward and backward against float32 by the definition."""
    from longext.attention.layout import make_layout

    variant, heads, kv_heads, documents, window = CASES[case]
    length, window = setting.tokens(_LENGTH), None if window is None else setting.tokens(window)
    torch.manual_seed(0)
    sizes = [(1, count, length, 128) for count in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(size, device=setting.device, dtype=setting.dtype) for size in sizes]
    gradient = torch.randn(1, length, heads, 128, device=setting.device, dtype=setting.dtype)
    ids = torch.arange(length)[None] * documents // length
    layout = make_layout(1, length, None, ids, documents > 1)

    def run(kernel: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attend(kernel, variant, layout, setting.tokens(1024), window, *leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    reference = run("eager", torch.float32)
    found = run(kernel, setting.dtype)
    names = ("out", "d_query", "d_key", "d_value")
    return {name: relative(x, y) for name, x, y in zip(names, found, reference, strict=True)}


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ||found - reference|| / ||reference||, computed in float32."""
    return float((found.float() - reference.float()).norm() / reference.float().norm())


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Gives adapters values before the first step (half of them begin as zeros) and keeps its gradients."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Draw the adapters; the same for every way to train, on every device."""
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Copy the gradients to the host."""
        named = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
        self.found = {name: g.detach().float().cpu() for name, g in named if g is not None}


def gradients(
    setting: Setting, attention: str, documents: int, reference: bool = False, **options: Any
) -> dict[str, torch.Tensor]:
    """Return the gradients of one step of a small model whose weights bfloat16 holds exactly."""
    length = setting.tokens(_LENGTH)
    torch.manual_seed(0)
    base = setting.build("parity", length, "sdpa", torch.bfloat16)
    if reference or setting.tiny:
        base = base.float()
        options = {**options, "dtype": "float32"}
    callback = Gradients()
    train(
        setting, "parity", [length], callback, base=base, documents=documents, attention=attention, group_size=1024,
        separate_documents=documents > 1, max_grad_norm=1e30, **{"kernels": "none", **options},
    )  # fmt: skip
    return callback.found


class GradientErrors:
    """Gradients of several ways to train, each against one float32 step, which is computed once a case."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self._known = setting, dict[tuple[str, int, bool], dict[str, torch.Tensor]]()

    def __call__(self, attention: str, documents: int, options: dict[str, Any]) -> dict[str, Any]:
        """Return relative deviations of all gradients: from float32, and from ordinary checkpointing's."""
        found = gradients(self.setting, attention, documents, **options)
        wanted = self._gradients(attention, documents, True)
        ordinary = found if not options else self._gradients(attention, documents, False)
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        return {
            "from_float32": _deviation(found, wanted),
            "ordinary_from_float32": _deviation(ordinary, wanted),
            "from_ordinary": _deviation(found, ordinary),
            "worst_parameter": max(relative(found[name], wanted[name]) for name in wanted),
        }

    def _gradients(self, attention: str, documents: int, is_reference: bool) -> dict[str, torch.Tensor]:
        key = (attention, documents, is_reference)
        if key not in self._known:
            plain = {"reference": True, "checkpointing": False, "backend": "eager"}
            options: dict[str, Any] = plain if is_reference else {}
            self._known[key] = gradients(self.setting, attention, documents, **options)
        return self._known[key]


def _deviation(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    names = list(reference)
    return relative(*(torch.cat([x[name].flatten() for name in names]) for x in (found, reference)))


def parity(setting: Setting) -> list[Measurement]:
    """Return kernels by case, then ways to train by attention and packing."""
    errors = GradientErrors(setting)
    own = [
        Measurement(f"parity/attention/{case}/{kernel}", 0.3, partial(attention, setting, kernel, case))
        for case in CASES
        for kernel in kernel_names()
    ]
    for name, (kind, documents) in {"s2": ("s2", 1), "s2 packed": ("s2", 4), "full": ("full", 1)}.items():
        for way, options in WAYS.items():
            if name == "s2" or way in _EVERYWHERE:
                run = partial(errors, kind, documents, options)
                own.append(Measurement(f"parity/gradients/{name}/{way}", 6.0 if "compile" in way else 0.7, run))
    return own
