"""What is kept of decoder layers for their backward pass: transformers' checkpointing function, made for long rows.

With gradient checkpointing a layer keeps its input and is computed again in the backward pass. Here that input may wait
in host memory, and several layers in a row may keep one input between them: those of the inner layers are then rebuilt
without a graph when the backward pass reaches the group. With L layers in groups of n, L / n + n hidden states live at
the peak instead of L, for (n - 1) / n of a forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from longext.training.layers.replay import Surroundings
from longext.training.layers.transfer import Transfer

Layer = Callable[..., Any]


class Rematerialisation:
    """The checkpointing function: called with a layer and its positional inputs, the hidden states first.

    Args:
        transfer: where layer inputs wait; None leaves them on the device.
        nested: layers that keep one hidden state between them. A layer joins the group of the one before if it was
            handed that layer's output itself; else it begins a group.
    """

    def __init__(self, transfer: Transfer | None = None, nested: int = 1) -> None:
        self._transfer, self._nested = transfer, nested
        self._group: weakref.ref[_Group] | None = None
        self._output: weakref.ref[torch.Tensor] | None = None

    def __call__(self, layer: Layer, *args: Any) -> Any:
        """Run the layer; its backward pass runs it again."""
        if not torch.is_grad_enabled():
            return layer(*args)
        hidden: torch.Tensor = args[0]
        group = self._group_of(hidden)
        number = group.add(layer, args)
        place, shape = hidden.data_ptr(), hidden.shape  # not the tensor: autograd keeps the hook

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.data_ptr() != place or tensor.shape != shape:
                return tensor
            if number == 0:
                group.first = tensor.detach() if self._transfer is None else self._transfer.store(tensor)
            return group, number

        with saved_tensors_hooks(pack, _unpack):
            output = checkpoint(layer, *args, use_reentrant=False)
        self._output = weakref.ref(hidden_of(output))
        return output

    def _group_of(self, hidden: torch.Tensor) -> _Group:
        """Return the group of the layer before, if `hidden` is its output and there is room; else a new one."""
        group = self._group() if self._group else None
        follows = self._output is not None and self._output() is hidden
        if group is None or not follows or len(group) == self._nested:
            group = _Group(self._load)
            self._group = weakref.ref(group)
        return group

    def _load(self, first: Any) -> torch.Tensor:
        tensor: torch.Tensor = first if self._transfer is None else self._transfer.load(first)
        return tensor


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, tuple):
        group, number = packed
        return group.input_of(number)  # type: ignore[no-any-return]
    tensor: torch.Tensor = packed
    return tensor


class _Group:
    """Layers in a row, of whose inputs the first is kept. Lives as long as one of them waits for its backward pass.

    Args:
        load: makes the first input of what is kept of it.
    """

    def __init__(self, load: Callable[[Any], torch.Tensor]) -> None:
        self.first: Any = None
        self._load = load
        self._layers: list[tuple[Layer, tuple[Any, ...], Surroundings]] = []
        self._inputs: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._layers)

    def add(self, layer: Layer, args: tuple[Any, ...]) -> int:
        """Take a layer in, and return its place."""
        self._layers.append((layer, args[1:], Surroundings(args[0])))
        return len(self._layers) - 1

    def input_of(self, number: int) -> torch.Tensor:
        """Return the input of a layer but the first: all up to it are rebuilt when the last one is asked for."""
        if number not in self._inputs:
            hidden = self._inputs[0] = self._load(self.first)
            for place, (layer, args, surroundings) in enumerate(self._layers[:number], 1):
                with torch.no_grad(), surroundings.again():
                    hidden = hidden_of(layer(hidden, *args))
                self._inputs[place] = hidden
        return self._inputs.pop(number)


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states in what a decoder layer returned."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden
