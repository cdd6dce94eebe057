"""What tokens gain from far text: their loss in a short window minus that in the whole text (arXiv 2410.23771).

One definition for the tokens that LongPPL counts and for the weights of LongCE. Windows move by a step: the tokens of a
step are read with the `context` tokens before the first of them, so with context to context + step - 1 tokens each.

Shape legend: B rows, T tokens of a row. Token 0 has nothing to be predicted from, so results have T - 1 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # options name the constants, and they start without torch
    import torch

    Score = Callable[[torch.Tensor, int], torch.Tensor]

MIN_GAIN, MAX_LOSS = 2.0, 2.0  # nats: alpha and -beta of the paper
LARGEST_WEIGHT = 5.0  # gamma of the paper
_LONGEST_CONTEXT, _STEPS, _SHARE = 4096, 4, 4  # the paper's 4,096 and 1,024; a quarter of shorter texts


def short_context(length: int, asked: int | None = None) -> int:
    """Return the tokens of context that a short window has: as asked, else a quarter of the text and at most 4,096."""
    return asked or max(1, min(_LONGEST_CONTEXT, length // _SHARE))


def short_step(context: int) -> int:
    """Return the tokens by which short windows move: a quarter of their context."""
    return max(1, context // _STEPS)


def short_windows(length: int, context: int, step: int) -> list[tuple[int, int, int]]:
    """Return the windows of a text of that length: (start, first token that is scored, end)."""
    return [(max(0, first - context), first, min(first + step, length)) for first in range(1, length, step)]


def windowed_loss(
    score: Score, tokens: torch.Tensor, context: int, step: int, whole: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the loss of tokens 1 .. T - 1 in nats [B, T - 1], each step read with `context` tokens before it.

    Args:
        score: (int64 [B, n], first) -> loss [B, n - first] of the tokens `first` .. n - 1, each given all before it.
        tokens: int64 [B, T].
        context: at least 1.
        whole: the same with everything before each token in view [B, T - 1]: taken where a window begins the text.
    """
    import torch

    parts = []
    for start, first, stop in short_windows(tokens.shape[1], context, step):
        if whole is not None and start == 0:
            parts.append(whole[:, first - 1 : stop - 1])
        else:
            parts.append(score(tokens[:, start:stop], first - start))
    return torch.cat(parts, 1)


def long_short(score: Score, tokens: torch.Tensor, context: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gain, loss in the whole text), each [B, T - 1] in nats; arguments as for `windowed_loss`."""
    whole = score(tokens, 1)
    return windowed_loss(score, tokens, context, step, whole) - whole, whole


def is_key(
    gain: torch.Tensor, loss: torch.Tensor, min_gain: float = MIN_GAIN, max_loss: float = MAX_LOSS
) -> torch.Tensor:
    """Return bool of the same shape: tokens that far text makes likely (arXiv 2410.23771, equation 4)."""
    return (gain > min_gain) & (loss < max_loss)


def longce_weights(gain: torch.Tensor) -> torch.Tensor:
    """Return min(exp(gain), 5), the weights of LongCE (arXiv 2410.23771, section 4); they take no gradient."""
    return gain.detach().exp().clamp(max=LARGEST_WEIGHT)
