"""Decoding: one loop for models that are read by segments; what `throughput.rows` needs of transformers' generation.

Shape legend: B rows, n tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from longext.checkpoint.checks import not_numbers
from longext.errors import ConfigError

Choose = Callable[[torch.Tensor], torch.Tensor]

# --- choosing a token -------------------------------------------------------------------------------------------------


def best_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Return the first of the best tokens, int64 [B], given logits [B, V]."""
    return logits.argmax(-1)


class Sampler:
    """Greedy at temperature 0; else nucleus sampling (arXiv 1904.09751), seeded.

    Args:
        temperature: logits are divided by it.
        top_p: only the most probable tokens that together reach this probability are drawn from.
        seed: of the draws.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        check_sampling(temperature, top_p)
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the next tokens, int64 [B], given logits [B, V]."""
        if not self.temperature:
            return best_tokens(logits)
        probabilities = torch.softmax(logits.detach().cpu().double() / self.temperature, -1)
        if not bool(probabilities.isfinite().all()):
            raise not_numbers("where a token is drawn")
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        inside = ordered.cumsum(-1) - ordered < self.top_p  # the token that reaches top_p is still inside
        drawn = torch.multinomial(ordered * inside, 1, generator=self._generator)
        return tokens.gather(-1, drawn)[:, 0].to(logits.device)


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ConfigError unless 0 <= temperature and 0 < top_p <= 1."""
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature must be >= 0 (0 takes the best token), got {temperature:g}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be above 0 and at most 1, got {top_p:g}.")


# --- one token after the other ----------------------------------------------------------------------------------------


def step_rows(
    next_logits: Callable[[], torch.Tensor],
    take: Callable[[torch.Tensor], object],
    count: int,
    ends: Collection[int] = (),
    choose: Choose | Sequence[Choose] = best_tokens,
    *,
    given: Sequence[Sequence[int]] = ((),),
    is_over: Callable[[int, int], bool] = lambda row, token: False,
) -> Iterator[list[int | None]]:
    """Yield after each step the new token of each of B rows; None for a row that has ended, or still takes given ones.

    Rows go through the model together until the last has ended. A token has been taken when it is yielded, so that
    whoever stops listening leaves a text that ends with it.

    Args:
        next_logits: -> logits [B, V] of what follows all that was taken.
        take: given the next tokens, int64 [B, 1].
        count: new tokens of a row at most; fewer up to and with one of `ends`.
        choose: logits [B, V] -> int64 [B]; or one for each row.
        given: the rest of each row's prompt: rows of different lengths take these tokens first.
        is_over: (row, new token) -> True if the row ends with it.
    """
    num_new, is_open = [0] * len(given), [count > 0] * len(given)
    step = 0
    while any(is_open):
        logits = next_logits()
        chosen = choose(logits).tolist() if callable(choose) else [None] * len(given)
        told: list[int | None] = []
        for row, prompt in enumerate(given):
            if step < len(prompt) or not is_open[row]:
                chosen[row] = prompt[step] if step < len(prompt) else 0  # what follows an end is only there to fill
                told.append(None)
                continue
            if not callable(choose):
                chosen[row] = int(choose[row](logits[row : row + 1]))
            told.append(chosen[row])
        take(torch.tensor(chosen, device=logits.device)[:, None])
        for row, token in enumerate(told):
            if token is not None:
                num_new[row] += 1
                is_open[row] = not (is_over(row, token) or token in ends) and num_new[row] < count
        step += 1
        yield told


def continue_rows(
    next_logits: Callable[[], torch.Tensor],
    take: Callable[[torch.Tensor], object],
    count: int,
    ends: Collection[int] = (),
    choose: Choose | Sequence[Choose] = best_tokens,
    num_rows: int = 1,
    **more: Any,
) -> list[list[int]]:
    """Return the continuations of B rows: what `step_rows` yields, row by row; its arguments."""
    more.setdefault("given", ((),) * num_rows)
    steps = list(step_rows(next_logits, take, count, ends, choose, **more))
    rows = zip(*steps, strict=True) if steps else [()] * num_rows
    return [[token for token in row if token is not None] for row in rows]


# --- transformers' generation -----------------------------------------------------------------------------------------


class NanWatch:
    """A logits processor that changes nothing and remembers logits that are not numbers (generation would go on)."""

    def __init__(self) -> None:
        self._found: torch.Tensor | None = None
        self._length = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Look at logits [B, V]; nothing waits for the device."""
        has_nan = scores.isnan().any()
        self._found = has_nan if self._found is None else self._found | has_nan
        self._length = input_ids.shape[1]
        return scores

    def check(self) -> None:
        """Raise LongextError if there were such logits."""
        if self._found is not None and bool(self._found):
            raise not_numbers(f"after {self._length:,} tokens")


@contextlib.contextmanager
def plain_generation(model: Any, ends: Collection[int]) -> Iterator[None]:
    """Leave nothing of a model's generation settings but the tokens that end a text, `ends`; undone on leaving.

    What else generation_config.json may set (a repetition penalty, beams, banned tokens) changes greedy decoding: it
    would not be the first choice at every token any more, as `score` judges it and models read by segments decode.
    """
    from transformers import GenerationConfig

    settings = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None)
        yield
    finally:
        model.generation_config = settings
