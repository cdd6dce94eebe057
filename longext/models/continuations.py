"""How likely a model finds each of several continuations of a prompt, which is read once where that is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from longext.checkpoint.checks import not_numbers
from longext.errors import ConfigError
from longext.models.answer_file import kept_scores
from longext.models.batching import batched_by
from longext.models.protocol import LanguageModel
from longext.models.throughput.prefixes import PrefixReader, shared_stretches, sharing_order, stretches_of
from longext.processes.dealing import deal, workers_of

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"torch.float32": 1e-3}  # nats per token between reading at once and behind a cache
_HALF_TOLERANCE = 0.1
_PACKED = 512  # tokens of continuations in one pass

Continued = Sequence[Sequence[int]]
_Form = Callable[[Sequence[int], Continued], list[float]]


class Continuations:
    """Scores continuations of prompts.

    A plain model reads a prompt once (of prompts that follow each other only what differs), and behind its cache all
    continuations in one row, each under a mask that hides the others; or, if the model takes no such mask, one after
    the other. That the first continuations are found as likely as in one pass is looked at once; if they are not,
    every continuation is read with its prompt.

    Attributes:
        reads_once: the prompt is read once; None until it was tried.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._reader = PrefixReader.of(model)
        self._form: _Form = self._packed
        self.reads_once: bool | None = None if self._reader else False

    def nll(self, prompt: Sequence[int], continuations: Continued) -> list[float]:
        """Return the negative log-likelihood of each continuation in nats, summed over its tokens.

        Args:
            prompt: at least one token.
        """
        self.decide(prompt, continuations)
        form = self._form if self.reads_once and len(prompt) > 1 else self._whole
        return form(prompt, continuations)

    def decide(self, prompt: Sequence[int], continuations: Continued) -> None:
        """Try how prompts can be read, unless that is known."""
        if self.reads_once is None:
            forms: tuple[_Form, ...] = (self._packed, self._one_by_one)
            self._form = next((form for form in forms if self._agrees(form, prompt, continuations)), self._whole)
            self.reads_once = self._form != self._whole

    def forget(self) -> None:
        """Keep nothing of the prompt before."""
        if self._reader is not None:
            self._reader.forget()

    def stretches(self, prompts: Continued) -> list[list[int]]:
        """Return prompts that share a prefix in lists, each in the order that shares most; longest first."""
        if self._reader is not None:
            return stretches_of(*sharing_order(prompts))
        return [[number] for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))]

    def _agrees(self, form: _Form, prompt: Sequence[int], continuations: Continued) -> bool:
        if len(prompt) < 2:
            return False
        first = [continuations[0], continuations[-1], continuations[0]]
        try:
            found = form(prompt, first)
        except (AttributeError, ConfigError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        whole = self._whole(prompt, first[:2])
        model: Any = self.model
        each = _TOLERANCE.get(str(model.model.dtype), _HALF_TOLERANCE)
        pairs = zip(found, [*whole, whole[0]], first, strict=True)
        return all(abs(value - exact) <= len(ids) * each + 1e-3 * abs(exact) for value, exact, ids in pairs)

    def _whole(self, prompt: Sequence[int], continuations: Continued) -> list[float]:
        import torch

        rows = ([*prompt, *continuation] for continuation in continuations)
        return [float(self.model.score(torch.tensor([row]), len(prompt)).nll.sum()) for row in rows]

    def _one_by_one(self, prompt: Sequence[int], continuations: Continued) -> list[float]:
        assert self._reader is not None
        self._reader.read(prompt[:-1])
        return [_nll(self._reader.behind([prompt[-1], *each[:-1]]), each) for each in continuations]

    def _packed(self, prompt: Sequence[int], continuations: Continued) -> list[float]:
        assert self._reader is not None
        self._reader.read(prompt[:-1])
        found = []
        for part in _parts(continuations):
            ids = [token for each in part for token in (prompt[-1], *each[:-1])]
            logits = self._reader.behind(ids, [len(each) for each in part])
            pieces = logits.split([len(each) for each in part])
            found += [_nll(piece, each) for piece, each in zip(pieces, part, strict=True)]
        return found


def _parts(continuations: Continued) -> Iterator[Continued]:
    part: list[Sequence[int]] = []
    for each in continuations:
        if part and sum(map(len, part)) + len(each) > _PACKED:
            yield part
            part = []
        part.append(each)
    yield part


def _nll(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """Return the summed negative log-likelihood of tokens, given logits [n, V] in front of each.

    Raises:
        LongextError: it is not finite.
    """
    import torch
    from torch.nn.functional import cross_entropy

    value = float(cross_entropy(logits, torch.tensor(list(ids), device=logits.device), reduction="sum"))
    if not math.isfinite(value):
        raise not_numbers(f"for a continuation of {len(ids):,} tokens")
    return value


# --- whether a model answers by itself --------------------------------------------------------------------------------


def first_choices(
    model: LanguageModel,
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    size: int,
    advance: Callable[[int], object] | None = None,
) -> list[torch.Tensor]:
    """Return for each (prompt, answer) which tokens of the answer are the model's first choice, bool [n].

    One forward pass over prompt + answer decides it, `size` of one length at once: greedy decoding gives the answer if
    and only if every token is the first choice given the prompt and the answer before it. A length-dependent RoPE has
    the rotation of prompt + answer throughout, as `LanguageModel.greedy` has. What prompts share is read once, if that
    saves enough.
    """
    import torch

    texts = [[*prompt, *answer] for prompt, answer in prompts]
    firsts = [len(prompt) for prompt, _ in prompts]

    def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
        scores = model.score(torch.tensor([texts[number] for number in batch]), firsts[batch[0]])
        return [{"is_top1": row.tolist()} for row in scores.is_top1.cpu()]

    def answer_behind(batch: Sequence[int]) -> list[dict[str, Any]]:
        assert reader is not None
        reader.forget()  # what a stretch gives depends on it alone
        return [{"is_top1": reader.first_choices(*prompts[number]).tolist()} for number in batch]

    reader, batches = shared_stretches(model, [prompt for prompt, _ in prompts])
    if reader is not None:
        answer = answer_behind
    else:
        batches = list(batched_by(range(len(texts)), size, lambda number: (firsts[number], len(texts[number]))))
    names, keeper = kept_scores(model, "first choices", list(zip(firsts, texts, strict=True)))
    rows = deal(names, batches, answer, keeper=keeper, on_progress=advance, workers=workers_of(model))
    return [torch.tensor(row["is_top1"]) for row in rows]


def begun_text(model: LanguageModel, answer_ids: Sequence[int], is_first: torch.Tensor) -> str:
    """Return what greedy decoding begins with: the tokens of an answer up to the one that is not the first choice.

    Args:
        is_first: of `first_choices`, bool [n].
    """
    return model.decode(answer_ids[: int(is_first.long().cumprod(0).sum())])
