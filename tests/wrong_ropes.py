"""Ways in which a loaded model can rotate otherwise than its method says, put into its rotary modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from longext.checkpoint import _built


def _frequencies(change: Any) -> Any:
    def spoil(module: torch.nn.Module) -> None:
        module.inv_freq = change(module.inv_freq)

    return spoil


def _theta(theta: float) -> Any:
    return _frequencies(lambda old: theta ** -(torch.arange(len(old)) / len(old)))


def _temperature(module: Any) -> None:
    module.attention_scaling = module.attention_scaling**2 * 1.01


def _half_positions(module: torch.nn.Module) -> None:
    """Positions go through bfloat16, which holds eight digits of them."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rounded = [value.to(torch.bfloat16).long() if value.dtype == torch.long else value for value in args]
        return tuple(rounded), kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True)


# by what went wrong
WRONG = {
    "scaled twice": _frequencies(lambda old: old / 8),
    "theta 100": _theta(100.0),
    "reversed": _frequencies(lambda old: old.flip(0)),
    "no rotation": _frequencies(torch.zeros_like),
    "lost": _theta(10_000.0),
    "bfloat16 frequencies": _frequencies(lambda old: old.to(torch.bfloat16).float()),
    "temperature twice": _temperature,
    "bfloat16 positions": _half_positions,
}


def spoil(model: Any, how: str) -> None:
    """Make the rotary modules of a loaded model wrong in the way `how`."""
    for module in _built.rotary_modules(model).values():
        WRONG[how](module)


@contextlib.contextmanager
def loaded_wrong(how: str) -> Iterator[None]:
    """Every model that `finetune` loads rotates wrongly."""
    from longext.training import longlora

    load = longlora.load_for_training

    def load_and_spoil(*args: Any) -> tuple[Any, Any]:
        model, tokenizer = load(*args)
        spoil(model, how)
        return model, tokenizer

    with mock.patch.object(longlora, "load_for_training", load_and_spoil):
        yield
