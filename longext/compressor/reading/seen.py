"""What a KV policy sees of one layer when it has to choose which keys stay, and what a policy is.

Shape legend: B texts, H KV heads, G query heads of each, n keys, q queries, d head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch


@dataclass
class Seen:
    """One layer of B texts: the keys held and those of the chunk just read, and queries that attend to them.

    Attributes:
        keys, values: [B, H, n, d], keys rotated to positions first .. first + n - 1; of the queries' own keys, where
            they are not to be kept (`num_probes`), the last ones.
        queries: [B, H, G, q, d], rotated to the last q positions.
        bias: [B, H, n] added to scores, -inf where a head holds no key there; None for zeros.
        scale: of the scores.
        cap: of the scores, or None (Gemma 2).
        turn: (tensor [..., m, d], int64 [m]) -> the tensor turned by so many positions more.
        budget: keys of a head that will stay.
        window: positions of the model.
        num_probes: queries that are no part of the text: their keys go anyway.
        origins: int32 [B, H, n], the number of each key's token in the text; -1 where a head holds none.
        num_read: tokens of the text so far.
        first: position of the first key.
        kept: per key, [B, H, n], what the policy noted of it (0 for new ones); it stays with the key.
        notes: of the layer, whatever the policy noted.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    cap: float | None
    turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    budget: int
    window: int
    num_probes: int
    origins: torch.Tensor
    num_read: int
    first: int = 0
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_keys(self) -> int:
        """Return how many keys there are to choose from."""
        return self.keys.shape[-2] - self.num_probes

    @cached_property
    def wide_keys(self) -> torch.Tensor:
        """All keys, in float32 at least."""
        return wide(self.keys)

    @property
    def text_keys(self) -> torch.Tensor:
        """The keys to choose from, in float32 at least."""
        return self.wide_keys[..., : self.num_keys, :]

    def scores(self, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the scores before the softmax, [B, H, G, stop - first, n], of these queries; -inf at what is not seen.

        In float32 at least.
        """
        total, end = self.keys.shape[-2], self.queries.shape[-2]
        queries = wide(self.queries[..., first:stop, :])
        # keys are not repeated for their group
        found = queries.flatten(2, 3) @ self.wide_keys.transpose(-1, -2) * self.scale
        found = found.unflatten(2, queries.shape[2:4])
        if self.cap is not None:
            found = self.cap * torch.tanh(found / self.cap)
        if self.bias is not None:
            found += wide(self.bias)[:, :, None, None]
        unseen = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(total - end + first + 1)
        return found.masked_fill_(unseen, -torch.inf)

    def attention(self, last: int | None = None) -> Iterator[torch.Tensor]:
        """Yield the attention of the last queries (None: all) over the keys to choose from: [B, H, G, some, n] each."""
        end, size = self.queries.shape[-2], rows_at_once(self.keys, self.queries.shape[2])
        for first in range(0 if last is None else max(0, end - last), end, size):
            yield self.scores(first, first + size).softmax(-1)[..., : self.num_keys]

    def total_attention(self, last: int | None = None, power: int = 1) -> torch.Tensor:
        """Return the sum [B, H, G, n] over these queries of the attention to some power."""
        raised = (part if power == 1 else part.pow(power) for part in self.attention(last))
        return reduce(torch.add, (part.sum(-2) for part in raised))


class KVPolicy(ABC):
    """Scores keys; those with the highest scores stay.

    Attributes of a class:
        reference: for reports; the summary is the first line of the module.
        needs_queries: False if keys, values and their order say all, so that it works with every family.
        repeats: its queries are those of reading each chunk again, right behind itself.
        can_ask: it scores by queries, so that it can be asked to take those of a question ("-aware").

    Attributes:
        aware: the queries are those of the end of the prompt, which is read behind every chunk and not kept there.
        newest: how many of the newest tokens always stay, instead of the policy's own number (`num_last`); or None.
    """

    reference = ""
    needs_queries = True
    repeats = False
    can_ask = False

    def __init__(self, aware: bool = False) -> None:
        self.aware = aware
        self.newest: int | None = None

    def num_first(self) -> int:
        """Return how many of the text's first tokens always stay."""
        return 0

    def num_last(self, budget: int) -> int:
        """Return how many of the newest tokens always stay, by the policy's definition."""
        return 0

    def stays(self, budget: int) -> int:
        """Return how many of the newest tokens always stay."""
        return self.num_last(budget) if self.newest is None else self.newest

    @abstractmethod
    def score(self, seen: Seen) -> torch.Tensor:
        """Return the scores [B, H, n] of the keys to choose from: higher stays."""

    def fit(
        self, seen: Seen, index: torch.Tensor, there: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (values [B, H, m, d], bias [B, H, m]) of the keys that stay; None as they are.

        Args:
            index, there: int64 and bool [B, H, m], which keys; False where a head keeps fewer than others.
        """
        return None, None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rows_at_once(keys: torch.Tensor, groups: int) -> int:
    """Return how many queries of a head may have numbers for each of keys [..., d]: a quarter of keys and values."""
    return max(1, keys.shape[-1] // (2 * groups))
