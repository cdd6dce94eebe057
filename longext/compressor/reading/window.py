"""A text in a plain model's own window: the model as transformers runs it, under a remapping too, and its KV cache.

Shape legend: B rows, n tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from longext.checkpoint.checks import not_numbers
from longext.compressor.reading.continuing import Advance, Continued, silent
from longext.models.hf import HFLanguageModel

_AT_ONCE = 2_048  # tokens of one pass


class WindowSession(Continued):
    """A text that a model holds in its window; every token goes through the model once.

    What was read stays read for as long as the text begins as it did: after `restore` and `reset` the cache is cut to
    what is still the same. A cache that cannot be cut (sliding windows, recurrent layers) is begun anew.

    Args:
        model: plain, or under a position remapping.
    """

    when_full = "refuse"

    def __init__(self, model: HFLanguageModel) -> None:
        self.model = model
        self.eos = model.ending_tokens
        self._held_for = 0
        self.hold_rope(model.context_length)
        self._cache: Any = None
        self._cached = self._ids = torch.zeros(1, 0, dtype=torch.int64, device=model.device)
        self._logits: torch.Tensor | None = None

    def hold_rope(self, length: int) -> None:
        """Hold a RoPE that follows the length of the text for one of `length` tokens (at first: the whole window)."""
        self._held_for = length if self.model.follows_length else 0

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return self.model.device

    @property
    def num_ids(self) -> int:
        """How many token ids the model knows."""
        return int(self.model.model.get_input_embeddings().weight.shape[0])

    @property
    def limit(self) -> int:
        """The positions of the model."""
        return self.model.context_length

    def refusal(self, num_tokens: int) -> str:
        """Return what to say where there is no room."""
        return (
            f"{num_tokens:,} tokens exceed the {self.limit:,} positions of {self.model.name}: give less text, extend "
            "the model (longext extend), or read with a --memory."
        )

    def reset(self) -> None:
        """Start a new text."""
        self._ids, self._logits, self.num_tokens = self._ids[:, :0], None, 0

    def add(self, tokens: torch.Tensor, advance: Advance = silent) -> None:
        """Take tokens; many at a time are read now, one (generated) when what follows it is asked for."""
        before, self._ids = self._ids, torch.cat([self._ids, tokens], 1)
        if tokens.shape[1] <= 1:
            return
        try:
            self._read(advance)
        except BaseException:  # what was half done is undone, and the text can go on
            self._ids = before
            raise

    def next_logits(self) -> torch.Tensor:
        """Return the logits of what follows; tokens since the last call are read on top of what is cached."""
        if self._logits is None or self._cached.shape[1] != self._ids.shape[1]:
            self._read(silent)
        assert self._logits is not None, "there is nothing to continue"
        return self._logits

    @torch.no_grad()
    def _read(self, advance: Advance) -> None:
        """Run the model over what is not cached."""
        self._cut()
        start = self._cached.shape[1]
        size = _AT_ONCE
        if getattr(self.model.model, "_is_stateful", False):  # recurrent layers go on from a state a token at a time
            size = self._ids.shape[1] if self._cache is None else 1
        for part in self._ids[:, start:].split(size, 1):
            held = self.model.frozen_rope(self._held_for) if self._held_for else contextlib.nullcontext()
            with held:
                output = self.model.model(input_ids=part, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache, self._cached = output.past_key_values, torch.cat([self._cached, part], 1)
            self._logits = output.logits[:, -1]
            self.num_computed += part.shape[1]
            if bool(self._logits.isnan().any()):
                raise not_numbers(f"after {self._cached.shape[1]:,} tokens")
            advance(part.shape[1])

    def _cut(self) -> None:
        """Cut the cache to the tokens that it has in common with the text; the last token is read again if need be."""
        size = min(self._cached.shape[1], self._ids.shape[1])
        differs = (self._cached[:, :size] != self._ids[:, :size]).any(0).nonzero()
        same = int(differs[0]) if len(differs) else size
        if same == self._cached.shape[1]:
            return
        same = min(same, self._ids.shape[1] - 1)
        layers = getattr(self._cache, "layers", [None])
        if same > 0 and all(type(layer) is DynamicLayer or _fits(layer) for layer in layers):
            self._cache.crop(same - self._cached.shape[1])
        else:
            self._cache, same = None, 0
        self._cached, self._logits = self._cached[:, :same], None

    def mark(self) -> Any:
        """Return the text."""
        return self._ids, self._logits

    def restore(self, mark: Any) -> None:
        """Put the text back; the cache is cut when something is read."""
        self._ids, logits = mark
        self._logits = logits if self._cached.shape == self._ids.shape else None

    @contextlib.contextmanager
    def rows(self, count: int) -> Iterator[None]:
        """Repeat text and cache; the cache of the one text is put back on leaving."""
        if self._ids.shape[1]:
            self.next_logits()
        before = self._ids, self._cached, self._cache, self._logits
        try:
            self._ids, self._cached = self._ids.expand(count, -1), self._cached.expand(count, -1)
            self._cache = copy.deepcopy(self._cache)
            if self._cache is not None:
                self._cache.batch_repeat_interleave(count)
            self._logits = None if self._logits is None else self._logits.expand(count, -1)
            yield
        finally:
            self._ids, self._cached, self._cache, self._logits = before

    def positions(self) -> tuple[int, int]:
        """Return the tokens of the text, and how many the model has positions for."""
        return self.num_tokens, self.limit

    def facts(self) -> dict[str, Any]:
        """Return the bytes of keys and values."""
        layers = getattr(self._cache, "layers", [])
        states = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        return {"num_bytes": sum(one.nbytes for one in states if isinstance(one, torch.Tensor))}


def _fits(layer: Any) -> bool:
    """True for a sliding window that has dropped nothing yet, so that it can be cut."""
    is_sliding = type(layer) is DynamicSlidingWindowLayer
    return is_sliding and int(layer.get_seq_length()) < int(layer.sliding_window)
