"""Choosing the next token: the best one, or a draw from the nucleus of the distribution."""

from __future__ import annotations

import torch

from longext.errors import ConfigError


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

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token given logits [V]."""
        if not self.temperature:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.detach().cpu().double() / self.temperature, -1)
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        inside = ordered.cumsum(-1) - ordered < self.top_p  # the token that reaches top_p is still inside
        drawn = torch.multinomial(ordered * inside, 1, generator=self._generator)
        return int(tokens[drawn])


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ConfigError unless 0 <= temperature and 0 < top_p <= 1."""
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature must be >= 0 (0 takes the best token), got {temperature:g}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be above 0 and at most 1, got {top_p:g}.")
