"""Ulysses-style sequence parallelism (arXiv 2309.14509): ranks share a row, and swap heads for sequence in attention.

Each of the R ranks of a group holds N / R consecutive tokens of every row. Before attention an all-to-all gives each
rank all N tokens of H / R heads; after it, another one gives the tokens back. Everything else is token-wise.

Shape legend: B rows, H query heads, K key-value heads, N tokens of the whole row, R ranks, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longext.errors import ConfigError


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share each row.

    Attributes:
        group: their torch.distributed process group.
        rank, size: this rank's place in it, and R.
    """

    group: Any
    rank: int
    size: int


def make_sequence_group(size: int) -> SequenceGroup | None:
    """Cut the world into groups of `size` consecutive ranks and return this rank's (None for size 1).

    Raises:
        ConfigError: no distributed run, or a world that `size` does not divide.
    """
    if size == 1:
        return None
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % size:
        raise ConfigError(
            f"--sequence-parallel {size} needs a number of processes that it divides, this run has {world}: "
            f"add --num-processes {size}."
        )
    # every rank makes every group: new_group is a collective of the whole world
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    rank = dist.get_rank()
    return SequenceGroup(groups[rank // size], rank % size, size)


def check_heads(num_heads: int, size: int) -> None:
    """Raise ConfigError if the query heads cannot be divided evenly among the ranks."""
    if num_heads % size:
        raise ConfigError(
            f"--sequence-parallel must divide the {num_heads} attention heads, got {size}: "
            f"use one of {', '.join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)}."
        )


def local_heads(num_heads: int, sequence: SequenceGroup) -> tuple[int, int]:
    """Return the range of query heads this rank computes."""
    share = num_heads // sequence.size
    return sequence.rank * share, (sequence.rank + 1) * share


def split_sequence(x: torch.Tensor, sequence: SequenceGroup) -> torch.Tensor:
    """Return this rank's share of [B, N, ...]; N must be a multiple of R."""
    return x.chunk(sequence.size, 1)[sequence.rank]


class _AllToAll(torch.autograd.Function):
    """all_to_all over the first dimension: block r of the result is what rank r sent to this rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        """Exchange the blocks of x [R, ...]."""
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Send the gradients back the same way: the exchange is its own transpose."""
        return _AllToAll.apply(gradients[0], ctx.group), None


def _exchange(x: torch.Tensor, sequence: SequenceGroup) -> torch.Tensor:
    """[B, H, N / R, D] -> [B, H / R, N, D]."""
    rows, heads, length, width = x.shape
    blocks = x.reshape(rows, sequence.size, heads // sequence.size, length, width).movedim(1, 0)
    swapped = _AllToAll.apply(blocks, sequence.group)  # [R, B, H / R, N / R, D]; block r: the tokens of rank r
    out: torch.Tensor = swapped.permute(1, 2, 0, 3, 4).reshape(rows, -1, sequence.size * length, width)
    return out


def sequence_to_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequence: SequenceGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give this rank whole rows of its heads: [B, H, N/R, D] -> [B, H/R, N, D]; k and v likewise.

    Key-value heads that R does not divide are repeated to the query heads first.
    """
    if key.shape[1] % sequence.size:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return _exchange(query, sequence), _exchange(key, sequence), _exchange(value, sequence)


def heads_to_sequence(out: torch.Tensor, sequence: SequenceGroup) -> torch.Tensor:
    """Give the tokens back: [B, N, H/R, D] -> [B, N/R, H, D]."""
    rows, length, heads, width = out.shape
    blocks = out.reshape(rows, sequence.size, length // sequence.size, heads, width).movedim(1, 0)
    swapped = _AllToAll.apply(blocks, sequence.group)  # [R, B, N / R, H / R, D]; block r: the heads of rank r
    whole: torch.Tensor = swapped.permute(1, 2, 0, 3, 4).reshape(rows, length // sequence.size, -1, width)
    return whole
