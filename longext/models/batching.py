"""How much goes through a model at once, and cutting a list of work into batches that can share a tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def batched_by(items: Sequence[T], size: int, key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Yield runs of consecutive items with equal `key`, at most `size` long, in order."""
    for _, run in itertools.groupby(items, key):
        while batch := list(itertools.islice(run, size)):
            yield batch


def default_batch_tokens(device: torch.device) -> int:
    """Tokens per forward pass: one window on a CPU (larger batches were slower there), 32,768 on an accelerator."""
    return 1 if device.type == "cpu" else 32_768


def batch_size(batch_tokens: int | None, length: int, device: torch.device) -> int:
    """Return how many windows of `length` tokens go through the model at once."""
    return max(1, math.floor((batch_tokens or default_batch_tokens(device)) / length))


def kv_numbers(config: Any) -> int:
    """Return the numbers that keys and values of one position are, in all layers of a model of this text config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size)
