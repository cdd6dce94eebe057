"""How likely a model finds each of several continuations of a prompt, which is read once where that is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longext.models.hf import HFLanguageModel
from longext.models.protocol import LanguageModel

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"torch.float32": 1e-3}  # nats per token between reading at once and behind a cache
_HALF_TOLERANCE = 0.1


class Continuations:
    """Scores continuations of prompts.

    A plain model reads a prompt once, and each continuation behind its cache. That it finds the first continuation as
    likely as in one pass is looked at once; if not (a rotation that follows the length, a cache that cannot go back, a
    family of its own), every continuation is read with its prompt.

    Attributes:
        reads_once: the prompt is read once; None until it was tried.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.reads_once: bool | None = None if type(model) is HFLanguageModel and not model.follows_length else False

    def nll(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """Return the negative log-likelihood of each continuation in nats, summed over its tokens.

        Args:
            prompt: at least one token.
        """
        self.decide(prompt, continuations[0])
        return self._behind_cache(prompt, continuations) if self.reads_once else self._whole(prompt, continuations)

    def decide(self, prompt: Sequence[int], continuation: Sequence[int]) -> None:
        """Try whether prompts can be read once, unless that is known."""
        if self.reads_once is None:
            self.reads_once = self._agrees(prompt, continuation)

    def _agrees(self, prompt: Sequence[int], continuation: Sequence[int]) -> bool:
        if len(prompt) < 2:
            return False
        try:
            cached = self._behind_cache(prompt, [continuation, continuation])
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        (whole,) = self._whole(prompt, [continuation])
        model: Any = self.model
        most = len(continuation) * _TOLERANCE.get(str(model.model.dtype), _HALF_TOLERANCE)
        return all(abs(value - whole) <= most + 1e-3 * abs(whole) for value in cached)

    def _whole(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        import torch

        rows = ([*prompt, *continuation] for continuation in continuations)
        return [float(self.model.score(torch.tensor([row]), len(prompt)).nll.sum()) for row in rows]

    def _behind_cache(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        import torch
        from torch.nn.functional import cross_entropy

        model: Any = self.model
        run, device = model.model, model.device
        with torch.no_grad():
            read = run(input_ids=_row(prompt[:-1], device), use_cache=True, logits_to_keep=1)
            cache, found = read.past_key_values, []
            for continuation in continuations:
                ids = _row([prompt[-1], *continuation[:-1]], device)
                logits = run(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float()
                targets = _row(continuation, logits.device)[0]
                found.append(float(cross_entropy(logits, targets, reduction="sum")))
                cache.crop(-len(continuation))  # takes so many away: the one form that all versions know
                if cache.get_seq_length() != len(prompt) - 1:
                    raise ValueError("the cache did not go back")
        return found


def _row(ids: Sequence[int], device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor([list(ids)], device=device)
