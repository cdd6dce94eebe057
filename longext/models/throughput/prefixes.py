"""Texts that begin alike, read one after another: the keys and values of what the next one shares are kept.

In sorted order every prefix is read once (a walk through the trie of the texts), from token ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longext.checkpoint.checks import not_numbers
from longext.models.head import decoder_of
from longext.models.throughput.caches import grows

if TYPE_CHECKING:
    from longext.models.hf import HFLanguageModel

_LEAST, _LEAST_SHARE = 32, 1 / 8  # shorter prefixes are read again: behind a cache attention needs a mask
_WORTH = 0.05  # of all tokens: what has to be saved
STRETCH = 16  # texts that are done, and kept of an interrupted run, at once
_TRIED = 2 * _LEAST  # tokens of the check
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the hidden states' spread, reading at once or in two parts
_HALF_TOLERANCE = 5e-2


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    different = np.asarray(a[:size], dtype=np.int64) != np.asarray(b[:size], dtype=np.int64)
    return int(different.argmax()) if different.any() else size


def kept_prefix(before: Sequence[int], ids: Sequence[int], most: int) -> int:
    """Return how many tokens of `ids` are kept from the text before, `most` at most; 0 if too few to be worth it."""
    kept = min(common_prefix(before, ids), most)
    return kept if kept >= max(_LEAST, _LEAST_SHARE * len(ids)) else 0


def sharing_order(texts: Sequence[Sequence[int]], most: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Return the order in which texts share most, and how many tokens of each are then not read, in that order.

    Args:
        most: tokens of each that may be kept; default all but the last.
    """
    order = sorted(range(len(texts)), key=lambda i: tuple(texts[i]))
    limits = [len(text) - 1 for text in texts] if most is None else list(most)
    kept = [kept_prefix(texts[a], texts[b], limits[b]) for a, b in zip(order, order[1:], strict=False)]
    return order, [0, *kept][: len(order)]


def num_tokens(texts: Sequence[Sequence[int]]) -> int:
    """Return the tokens of all texts."""
    return sum(map(len, texts))


def is_worth_it(texts: Sequence[Sequence[int]], kept: Sequence[int]) -> bool:
    """True if enough tokens are not read."""
    return sum(kept) >= _WORTH * num_tokens(texts)


def stretches_of(order: Sequence[int], kept: Sequence[int], most: int = 0) -> list[list[int]]:
    """Return texts in order in lists: a new one where nothing is kept of the text before, and after so many texts.

    These are `most`, and not fewer than STRETCH.

    A list is read from its beginning, so that its results do not depend on where and after what it is read.
    """
    stretches: list[list[int]] = []
    for index, size in zip(order, kept, strict=True):
        if size and len(stretches[-1]) < max(STRETCH, most):
            stretches[-1].append(index)
        else:
            stretches.append([index])
    return stretches


def shared_stretches(model: Any, texts: Sequence[Sequence[int]]) -> tuple[PrefixReader | None, list[list[int]]]:
    """Return a reader and the stretches of texts to read with it; None if that saves too little or is not possible."""
    order, kept = sharing_order(texts)
    reader = PrefixReader.of(model) if is_worth_it(texts, kept) else None
    return reader, stretches_of(order, kept)


class PrefixReader:
    """Reads texts with a plain model and keeps the keys and values of the last one.

    Attributes:
        ids: the text whose keys and values are kept.
        cache: transformers' DynamicCache of one row.
    """

    def __init__(self, model: HFLanguageModel) -> None:
        self.model = model
        self._decoder = decoder_of(model.model)
        self.forget()

    @staticmethod
    def of(model: Any) -> PrefixReader | None:
        """Return a reader if a prefix of this model can be kept, else None.

        It can where the cache of every layer grows by a token per token and the rotation is fixed. With windows,
        recurrent states, rotations that follow the length, or a memory, texts are read whole. Some tokens, more than a
        position remapping leaves as they are, have to give the same hidden states read at once and in two parts.
        """
        from longext.models.hf import HFLanguageModel

        if type(model) is not HFLanguageModel or model.follows_length:
            return None
        reader = PrefixReader(model)
        try:
            return reader if reader._agrees() else None
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return None
        finally:
            reader.forget()

    def forget(self) -> None:
        """Keep nothing."""
        self.ids: list[int] = []
        self.cache: Any = None

    @torch.no_grad()
    def read(self, ids: Sequence[int], first: int | None = None) -> torch.Tensor:
        """Read a text; return its last hidden states from token `first` on, [1, T - first, D] (default: none)."""
        first = len(ids) if first is None else first
        self.rewind(kept_prefix(self.ids, ids, min(first, len(self.ids))))
        kept = len(self.ids)
        if kept == len(ids):
            return torch.empty(0)
        new = torch.tensor([list(ids[kept:])], device=self.model.device)
        out = self._decoder(input_ids=new, past_key_values=self.cache, use_cache=True)
        self.ids, self.cache = list(ids), out.past_key_values
        hidden: torch.Tensor = out.last_hidden_state
        return hidden[:, first - kept :]

    @torch.no_grad()
    def behind(self, ids: Sequence[int], lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Return float32 logits [n, V] of tokens behind the text that was read; they are not kept.

        Args:
            lengths: the tokens are several continuations of these lengths, none of which sees another.

        Raises:
            ValueError: the cache did not go back.
        """
        device, size = self.model.device, len(self.ids)
        own = {} if lengths is None else self._apart(lengths)
        tokens = torch.tensor([list(ids)], device=device)
        out = self.model.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **own)
        self.cache = out.past_key_values
        self.rewind()
        if self.cache is not None and self.cache.get_seq_length() != size:
            raise ValueError("the cache did not go back")
        logits: torch.Tensor = out.logits[0].float()
        return logits

    @torch.no_grad()
    def first_choices(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Return which tokens of an answer are the model's first choice behind a prompt, bool [n].

        Raises:
            LongextError: logits that are not numbers.
        """
        self.rewind(kept_prefix(self.ids, prompt, len(prompt) - 1))
        new = torch.tensor([[*prompt[len(self.ids) :], *answer[:-1]]], device=self.model.device)
        out = self.model.model(input_ids=new, past_key_values=self.cache, use_cache=True, logits_to_keep=len(answer))
        self.ids, self.cache, logits = list(prompt), out.past_key_values, out.logits[0]
        self.rewind()
        if bool(logits.isnan().any()):
            raise not_numbers(f"after {len(prompt):,} tokens")
        is_first: torch.Tensor = logits.argmax(-1).cpu() == torch.tensor(list(answer))
        return is_first

    def _apart(self, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return positions [1, n] and the mask [1, 1, n, T + n] of continuations in one row."""
        device, size, dtype = self.model.device, len(self.ids), self.model.model.dtype
        positions = torch.cat([torch.arange(size, size + length) for length in lengths])
        blocks = torch.block_diag(*[torch.ones(length, length).tril() for length in lengths])
        seen = torch.cat([torch.ones(len(positions), size), blocks], 1).to(device)
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(seen == 0, torch.finfo(dtype).min)
        return {"position_ids": positions[None].to(device), "attention_mask": mask[None, None]}

    def rewind(self, size: int | None = None) -> None:
        """Go back to the first `size` tokens of the text (default: all of it, without what was written behind it)."""
        size = len(self.ids) if size is None else size
        if not size:
            self.forget()
            return
        extra = self.cache.get_seq_length() - size
        if extra:
            self.cache.crop(-extra)  # takes so many away: the one form that all versions know
        self.ids = self.ids[:size]

    def _agrees(self) -> bool:
        remapping = self.model.remapping
        size = _TRIED + (remapping.spec.exact_length if remapping else 0)
        rows = self.model.model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(size) * 7 % rows).tolist()
        with torch.no_grad():
            whole = self._decoder(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False)
        self.read(ids[: size // 2])
        if not grows(self.cache):
            return False
        parts = self.read(ids, size // 2).float()
        self.rewind(size // 2)
        expected = whole.last_hidden_state[:, size // 2 :].float()
        most = _TOLERANCE.get(self.model.model.dtype, _HALF_TOLERANCE) * float(expected.std())
        return self.cache.get_seq_length() == size // 2 and float((parts - expected).abs().max()) <= most
