"""What every evaluation asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from longext.models.turns import Asking

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenScores:
    """Scores of the last tokens of a batch of windows.

    Attributes:
        nll: negative log-likelihood in nats, float32 [B, n].
        is_top1: True if the token was the model's first choice, bool [B, n].
    """

    nll: torch.Tensor
    is_top1: torch.Tensor


class LanguageModel(Protocol):
    """Everything that can be scored and can answer: a model as it is, or one that reads a text by segments.

    Attributes:
        name: what the user called it.
        asking: how questions are put to it: template variables, thoughts, control tokens.
    """

    name: str

    @property
    def asking(self) -> Asking:
        """How questions are put to it."""
        ...

    @asking.setter
    def asking(self, asking: Asking) -> None:
        """Let questions be put to it so."""
        ...

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its transformers tokenizer."""
        ...

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens put before a text: mostly a BOS or nothing."""
        ...

    @property
    def ending_tokens(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    @property
    def trained_length(self) -> int:
        """The pre-training length in tokens that its RoPE refers to."""
        ...

    @property
    def context_length(self) -> int:
        """How many positions the model has, with the extension that was applied to it."""
        ...

    @property
    def follows_length(self) -> bool:
        """True if the rotation of a token depends on how long its text is (dynamic NTK, LongRoPE)."""
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

    def weights_checksum(self) -> str:
        """Return a hash of every parameter of the model itself."""
        ...
