"""Answers of several prompts written at once by transformers' `generate`: a row that has ended leaves the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from longext.models.decode import NanWatch, plain_generation
from longext.models.engine.caches import some_rows

if TYPE_CHECKING:
    from longext.models.hf import HFLanguageModel

Stopped = Callable[[int, list[int]], bool]  # number of a prompt, its new tokens -> its answer has ended


@torch.no_grad()
def write_rows(
    model: HFLanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
    *,
    min_new_tokens: int = 0,
    is_stopped: Stopped | None = None,
    cache: Any = None,
) -> list[list[int]]:
    """Return the greedy new tokens of each prompt; what follows a row's end is only there to fill.

    Shorter prompts are padded on the left. As soon as half the rows have ended, the others go on without them: their
    keys and values are taken out of the cache. A RoPE that follows the length is held at the longest prompt +
    `max_new_tokens`.

    Args:
        ends: tokens that end a row.
        is_stopped: what else ends one.
        cache: keys and values of all prompts but their last tokens, padded as they are; it is changed.

    Raises:
        LongextError: logits that are not numbers.
    """
    longest, pad = max(map(len, prompts)), model.pad_token() or 0  # masked: which token fills is without effect
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    rows, written, may_leave = list(range(len(prompts))), 0, True
    with model.frozen_rope(longest + max_new_tokens), plain_generation(model.model, ends):
        while rows and written < max_new_tokens:
            leaving = _Leaving(rows, longest, ends, is_stopped, may_leave)
            output = model.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens - written,
                min_new_tokens=max(0, min_new_tokens - written) or None,
                pad_token_id=pad,
                do_sample=False,
                disable_compile=True,
                logits_processor=[watch := NanWatch()],
                stopping_criteria=leaving.criteria(),
                return_dict_in_generate=True,
                **({} if cache is None else {"past_key_values": cache}),
            )
            watch.check()
            new = output.sequences[:, ids.shape[1] :]
            for row, tokens in zip(rows, new.tolist(), strict=True):
                answers[row] += tokens
            written += new.shape[1]
            staying = leaving.staying()
            if not staying or written >= max_new_tokens:
                break
            index = torch.tensor(staying, device=model.device)
            cache = some_rows(output.past_key_values, index)
            may_leave = cache is not None
            ids, rows = output.sequences[index], [rows[i] for i in staying]
            mask = torch.cat([mask[index], mask.new_ones(len(staying), new.shape[1])], 1)
    return answers


class _Leaving:
    """Which rows have ended; a stopping criterion that ends the call once those that have not should go on alone."""

    def __init__(
        self, rows: Sequence[int], longest: int, ends: Collection[int], is_stopped: Stopped | None, may_leave: bool
    ) -> None:
        self._rows, self._longest, self._is_stopped, self._may_leave = rows, longest, is_stopped, may_leave
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64)
        self._ended = [False] * len(rows)

    def criteria(self) -> Any:
        """Return it as transformers takes it."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        class _Criterion(StoppingCriteria):  # type: ignore[misc]
            def __call__(_, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                return self._look(input_ids)

        return StoppingCriteriaList([_Criterion()])

    def staying(self) -> list[int]:
        """Return the places of the rows that have not ended."""
        return [place for place, ended in enumerate(self._ended) if not ended]

    def _look(self, input_ids: torch.Tensor) -> torch.Tensor:
        ends = torch.isin(input_ids[:, -1], self._ends.to(input_ids.device)).tolist()
        self._ended = [was or now for was, now in zip(self._ended, ends, strict=True)]
        if self._is_stopped is not None:
            new = input_ids[:, self._longest :].tolist()
            for place in self.staying():
                self._ended[place] = self._is_stopped(self._rows[place], new[place])
        leave = self._may_leave and 2 * len(self.staying()) <= len(self._rows)
        return torch.tensor([leave or ended for ended in self._ended], device=input_ids.device)
