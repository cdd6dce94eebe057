"""MLPs and norms over a tile of the sequence at a time: what a layer needs at its peak is then a tile's worth.

They work on each token by itself, so a tile gives what the whole sequence would. Forward keeps a module's input alone;
backward runs each tile again with a graph and adds up the gradients. Under gradient checkpointing the recomputation of
a layer stops where its last saved tensor is made, which is the input of the MLP if nothing that is trained or tiled
follows it: such an MLP then runs twice in all, as often as with checkpointing alone. Behind a norm that follows the MLP
(Gemma 2 and 3, OLMo 2) it runs three times.

Shape legend: B rows, N tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from longext.errors import ConfigError
from longext.models.head import decoder_of
from longext.training.layers.replay import Surroundings
from longext.training.tuning import is_norm

_PROBED = 6  # tokens


def token_wise_modules(model: Any) -> list[str]:
    """Return the full names of the norms of a decoder and of what its layers hold beside attention: their MLPs.

    The norms inside attention are left out.

    Args:
        model: a transformers causal LM, before PEFT has wrapped its modules (the names stay the same).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = decoder_of(model)
    ids = {id(module) for module in decoder.modules()}
    found: list[str] = []
    for name, module in model.named_modules():
        if id(module) not in ids or not (module is decoder or isinstance(module, GradientCheckpointingLayer)):
            continue
        for child_name, child in module.named_children():
            is_mlp = module is not decoder and "attn" not in child_name and "attention" not in child_name
            if is_norm(child_name, child) or (is_mlp and any(True for _ in child.parameters())):
                found.append(f"{name}.{child_name}" if name else child_name)
    return found


@torch.no_grad()
def check_token_wise(model: Any, names: list[str]) -> None:
    """Raise ConfigError if one of these modules does not give each token its own output, whatever stands beside it.

    Modules of one class and name are tried once, on a few random tokens.
    """
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().hidden_size
    x = torch.randn(1, _PROBED, size, generator=generator).to(embedding.device, embedding.dtype)
    tried: set[tuple[str, type]] = set()
    for name in names:
        module = model.get_submodule(name)
        key = name.rpartition(".")[2], type(module)
        if key in tried:
            continue
        tried.add(key)
        was_training = module.training
        module.eval()
        try:
            reason = _why_not(module, x)
        finally:
            module.train(was_training)
        if reason:
            raise ConfigError(
                f"--tile cannot cut {name} ({type(module).__name__}) of a {model.config.model_type} model: {reason}. "
                "Leave --tile out."
            )


def _why_not(module: nn.Module, x: torch.Tensor) -> str | None:
    try:
        whole = module(x)
        parts = [module(part) for part in (x[:, :2], x[:, 2:], x[:, :0])]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"it does not take a part of the tokens ({type(error).__name__})"
    if not all(isinstance(part, torch.Tensor) and part.ndim == 3 for part in (whole, *parts)) or whole.shape != x.shape:
        return "it does not return one tensor of its input's shape"
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(torch.cat(parts, 1).float(), whole.float(), rtol=tolerance, atol=tolerance):
        return "the output of a token depends on the tokens beside it"
    return None


def use_tiles(model: Any, names: list[str], tile: int) -> None:
    """Let these modules run over `tile` tokens at a time in training; a shorter sequence runs as it is.

    Two forward hooks on each, no patched method. Evaluations are left alone.

    Args:
        model: the causal LM, with all other hooks already on its modules: they run for each tile.
    """
    for name in names:
        _Tiled(model.get_submodule(name), tile)


class _Tiled:
    """The hooks of one module: it is handed no tokens, and its empty output is replaced by that of all tiles."""

    def __init__(self, module: nn.Module, tile: int) -> None:
        self._tile = tile
        self._whole: torch.Tensor | None = None
        self._inside = False
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        (x,) = args
        if self._inside or not module.training or x.shape[1] <= self._tile:
            return None
        self._whole = x
        return (x.new_empty(x.shape[0], 0, *x.shape[2:]),)

    def _after(self, module: nn.Module, _: Any, empty: torch.Tensor) -> torch.Tensor | None:
        x, self._whole = self._whole, None
        if x is None:
            return None
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

        def run(tokens: torch.Tensor) -> torch.Tensor:
            self._inside = True
            try:
                output: torch.Tensor = module(tokens)
                return output
            finally:
                self._inside = False

        output: torch.Tensor = _Tiles.apply(x, run, self._tile, empty.detach(), *trained)
        # filled only now: a recomputation that ends with the saving of x does not get here
        with torch.no_grad():
            torch.clear_autocast_cache()
            values, filled = x.detach(), output.detach()
            for part in _parts(x, self._tile):
                filled[part] = run(values[part].contiguous())
            torch.clear_autocast_cache()  # what was cast without a graph: it would take no gradient
        return output


def _parts(x: torch.Tensor, tile: int) -> Iterator[tuple[slice, slice]]:
    """Yield the index of each tile of [B, N, ...]."""
    for start in range(0, x.shape[1], tile):
        yield slice(None), slice(start, start + tile)


class _Tiles(torch.autograd.Function):
    """Forward saves its input and returns room for the output; backward runs the tiles with a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
        tile: int,
        empty: torch.Tensor,
        *trained: nn.Parameter,
    ) -> torch.Tensor:
        """Return an uninitialised [B, N, ...] of the kind that `empty` [B, 0, ...] is."""
        ctx.save_for_backward(x)
        ctx.run, ctx.tile, ctx.trained = run, tile, trained
        ctx.surroundings = Surroundings(x)
        return empty.new_empty(x.shape[0], x.shape[1], *empty.shape[2:])

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of the input and, summed over tiles, of what is trained."""
        (gradient,), (x,) = outputs, ctx.saved_tensors
        wants_x = ctx.needs_input_grad[0]
        x_gradient = torch.empty_like(x) if wants_x else None
        sums: list[torch.Tensor | None] = [None] * len(ctx.trained)
        with torch.enable_grad(), ctx.surroundings.again():
            for part in _parts(x, ctx.tile):
                tokens = x[part].detach().contiguous().requires_grad_(wants_x)
                inputs = [*([tokens] if wants_x else []), *ctx.trained]
                output = ctx.run(tokens.view_as(tokens))  # no leaf: torch's counter of FLOPs takes none here
                found = list(torch.autograd.grad(output, inputs, gradient[part], allow_unused=True))
                if x_gradient is not None:
                    x_gradient[part] = found.pop(0)
                sums = [_add(total, new) for total, new in zip(sums, found, strict=True)]
        return (x_gradient, None, None, None, *sums)


def _add(total: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or new is None:
        return new if total is None else total
    return total.add_(new)
