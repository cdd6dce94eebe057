"""Gradients of a long computation with the graph of one of its steps alive.

Steps run in order, and each may read what earlier ones left behind: the memories of a document's segments, or the keys
and values of a row's chunks. First all of them run without a graph. Then they run again in reverse with one: when step
t is reached, all its readers have left their gradients for it, which go back together with its own. The result is the
gradient that autograd gives through one graph of everything (see `compressor.gradients`, docs/longlora.md).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from longext.attention.chunks import Chunk, KeyValueStore
from longext.attention.shifted import PLAN, AttentionPlan
from longext.errors import ConfigError
from longext.models.head import decoder_of
from longext.models.rotary import held_rotation
from longext.training.layers.replay import RandomState

AUTO, OFF = "auto", "off"
_MOST_DIGITS = 19  # what Python makes a number of whatever its settings
_USUAL_CHUNK = 8192  # long enough to fill a GPU, short enough that a layer's work is small beside the weights


def chunk_tokens(sweep: str, row_length: int, group_size: int | None) -> int | None:
    """Return the tokens of a chunk for `--sweep`, or None if the row is not swept or is no longer than one.

    Args:
        sweep: a number, "off", or "auto": the least multiple of the group of at least 8,192 tokens, under full
            attention 8,192.
        group_size: of S2-Attn, None under full attention.

    Raises:
        ConfigError: none of these.
    """
    if sweep == OFF:
        return None
    if sweep == AUTO:
        chunk = _USUAL_CHUNK if group_size is None else -(-_USUAL_CHUNK // group_size) * group_size
    elif sweep.isascii() and sweep.isdigit() and len(sweep) < _MOST_DIGITS and int(sweep) > 0:
        chunk = int(sweep)
    else:
        raise ConfigError(f"--sweep takes a number of tokens, auto or off, got '{sweep}'.")
    return chunk if chunk < row_length else None


class Steps(ABC):
    """What is swept.

    Attributes:
        count: of the steps.
        device: where they draw random numbers (dropout), besides the CPU.
    """

    count: int
    device: torch.device

    @abstractmethod
    def write(self, t: int) -> None:
        """Run step t without a graph and keep what later steps read of it; never called for the last step."""

    @abstractmethod
    def pull_back(self, t: int) -> torch.Tensor:
        """Run step t with a graph, take its gradients and those left for it; returns its loss without a graph."""


def run_sweep(steps: Steps) -> torch.Tensor:
    """Add the gradient of the sum of all losses to the parameters and return that sum (no graph).

    A step draws the same random numbers in both of its runs.
    """
    states = []
    with torch.no_grad():
        for t in range(steps.count - 1):
            states.append(RandomState(torch.empty(0, device=steps.device)))
            steps.write(t)
    losses = [steps.pull_back(steps.count - 1)]
    for t in reversed(range(steps.count - 1)):
        with states[t].again():  # the state alone: around autocast, its copies of weights would outlive their pass
            losses.append(steps.pull_back(t))
    return torch.stack(losses).sum()


def sweep_rows(
    network: Any,
    tensors: dict[str, torch.Tensor],
    plan: AttentionPlan,
    size: int,
    num_items: Any,
    *,
    store: KeyValueStore | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> torch.Tensor:
    """Add the gradient of the loss of one batch of rows, in chunks, and return the loss.

    It is the summed cross-entropy over `num_items`; the gradient is that of one graph of the whole rows.

    Args:
        network: a causal LM in train mode under one of our attention variants, or a PEFT model of one.
        tensors: [B, N] each, what its forward takes for every token: input_ids, position_ids, labels and shift_labels.
        plan: the attention of whole rows.
        size: tokens of a chunk; the last may be shorter.
        store: where keys and values wait (default: on the device).
        autocast: makes the context that forward passes run in.
    """
    decoder = decoder_of(network.get_base_model() if hasattr(network, "get_base_model") else network)

    def run(arguments: dict[str, Any]) -> None:
        with autocast():
            decoder(**{name: value for name, value in arguments.items() if "labels" not in name})

    def loss(arguments: dict[str, Any]) -> torch.Tensor:
        with autocast():
            share: torch.Tensor = network(**arguments, num_items_in_batch=num_items)["loss"]
        return share

    with held_rotation(network, plan.layout.length):  # RoPE that follows the length sees that of the row
        return run_sweep(_RowChunks(tensors, plan, size, store or KeyValueStore(), run, loss))


@dataclass
class _RowChunks(Steps):
    """One batch of rows, in chunks of tokens.

    Attributes:
        run: forward arguments of a chunk -> anything; runs all layers.
        loss: forward arguments of a chunk -> its share of the batch's loss.
    """

    tensors: dict[str, torch.Tensor]
    plan: AttentionPlan
    size: int
    store: KeyValueStore
    run: Callable[[dict[str, Any]], None]
    loss: Callable[[dict[str, Any]], torch.Tensor]

    def __post_init__(self) -> None:
        self.length = self.plan.layout.length
        self.count = -(-self.length // self.size)
        self.device = next(iter(self.tensors.values())).device

    def write(self, t: int) -> None:
        """Run the layers over a chunk; its attention keeps the keys and values that later chunks see."""
        self.run(self._arguments(t))

    def pull_back(self, t: int) -> torch.Tensor:
        """Run a chunk with its loss; gradients of earlier keys and values go to the store."""
        loss = self.loss(self._arguments(t))
        loss.backward()  # type: ignore[no-untyped-call]
        self.store.forget(t)
        return loss.detach()

    def _arguments(self, t: int) -> dict[str, Any]:
        start, stop = t * self.size, min((t + 1) * self.size, self.length)
        parts = {name: tensor[:, start:stop] for name, tensor in self.tensors.items()}
        return {**parts, PLAN: replace(self.plan, chunk=Chunk(t, start, stop, self.store)), "use_cache": False}
