"""Low-rank adapters on the linear layers of one frozen model, switched by name: no copies of weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from longext.checkpoint.families import projection_names
from longext.errors import ConfigError

_NAMES = {role: projection_names(role) for role in "qkvo"}
Rows = torch.Tensor | None


class LowRank(nn.Module):
    """x [..., in] -> (alpha / r) x A^T B^T [..., out]; zero until trained (LoRA, arXiv 2106.09685)."""

    def __init__(self, linear: Any, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = linear.out_features, linear.in_features
        device = linear.weight.device
        dtype = torch.promote_types(linear.weight.dtype, torch.float32) if linear.weight.is_floating_point() else None
        self.A = nn.Parameter(torch.empty(rank, inputs, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(outputs, rank, device=device, dtype=dtype))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapter's share of the output, in the dtype of `x`."""
        narrow = x @ self.A.to(x.dtype).T
        return (narrow * self.scale) @ self.B.to(x.dtype).T


class Adapters(nn.Module):
    """Named sets of `LowRank` on the projections of attention modules, as forward hooks.

    No set is active outside `use`, so the model is then the base model bit for bit.

    Args:
        attentions: the attention module of every layer.
        rank, alpha: of every adapter.
    """

    def __init__(self, attentions: list[nn.Module], rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.sets = nn.ModuleDict()
        self._attentions = tuple(attentions)  # a tuple: the base is not ours to save
        self._active: dict[str, Rows] = {}

    def add(self, name: str, roles: str, num_layers: int | None = None) -> None:
        """Put adapter set `name` on projections `roles` (of "qkvo") of the first `num_layers` layers; may be repeated.

        Raises:
            ConfigError: the model's attention has no such linear layers.
        """
        layers: Any = self.sets[name] if name in self.sets else nn.ModuleDict()
        for index, attention in enumerate(self._attentions[:num_layers]):
            for target, linear in projections(attention, roles).items():
                if f"{index}_{target}" in layers:
                    continue  # one fused layer for several roles
                adapter = LowRank(linear, self.rank, self.alpha)
                layers[f"{index}_{target}"] = adapter
                linear.register_forward_hook(self._hook(name, adapter))
        self.sets[name] = layers

    def _hook(self, name: str, adapter: LowRank) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if name not in self._active:
                return None
            rows = self._active[name]
            if rows is None:
                return output + adapter.forward(args[0])
            return output.index_add(1, rows, adapter.forward(args[0][:, rows]))

        return hook

    @contextlib.contextmanager
    def use(self, *names: str | None, rows: Rows = None) -> Iterator[None]:
        """Switch on the sets `names` and no other; `rows` (int64 [n], of axis 1) limits them to some tokens."""
        before, self._active = self._active, {name: rows for name in names if name is not None}
        try:
            yield
        finally:
            self._active = before

    def remembering(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Return `checkpoint` such that a layer is run again under the adapters it first ran under.

        A backward pass runs checkpointed layers again, and by then other adapters may be active: the gradient would be
        of another function.
        """

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            active = self._active

            def again(*inputs: Any) -> Any:
                before, self._active = self._active, active
                try:
                    return function(*inputs)
                finally:
                    self._active = before

            return checkpoint(again, *args, **kwargs)

        return run


def projections(attention: nn.Module, roles: str) -> dict[str, Any]:
    """Return the linear layers of an attention module that make the `roles` (letters of "qkvo"), by name.

    If query, key and value come from one fused layer, that layer is returned for any of them.

    Raises:
        ConfigError: there is none.
    """
    children = dict(attention.named_children())
    layers = {name: children[name] for role in roles for name in _NAMES[role] if name in children}
    if not layers or (set(roles) & set("qkv") and not any(name in layers for r in "qkv" for name in _NAMES[r])):
        layers |= {name: children[name] for name in projection_names("qkv") if name in children}
    if not layers:
        raise ConfigError(
            f"{type(attention).__name__} has no {'/'.join(roles)} projections that longext knows; it has "
            f"{', '.join(children)}. Llama, Mistral, Qwen, Gemma, Phi and GPT-NeoX models do."
        )
    return layers
