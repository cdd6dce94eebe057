"""What every evaluation asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenScores:
    """Scores of the last tokens of a batch of windows.

    Attributes:
        nll: negative log-likelihood in nats, float32 [B, n].
        is_top1: True where the token was the model's first choice, bool [B, n].
    """

    nll: torch.Tensor
    is_top1: torch.Tensor


class LanguageModel(Protocol):
    """Everything that can be scored: a plain model, and later adapters, compressors and cache policies."""

    name: str

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        ...

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens put before a text: mostly a BOS or nothing."""
        ...

    @property
    def ending_tokens(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    def score(self, input_ids: torch.Tensor, first: int) -> TokenScores:
        """Score tokens `first` .. T-1 of `input_ids` (int64 [B, T], first >= 1), each given all before it."""
        ...

    def greedy(self, input_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of one prompt, `max_new_tokens` at most, up to and with an ending token."""
        ...

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return token ids; with `add_bos` the tokenizer's own prefix in front."""
        ...

    def decode(self, input_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a result says of the model: id, config and tokenizer hashes, RoPE, attention, dtype, device."""
        ...
