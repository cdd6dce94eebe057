"""Tokens as text while they come: whole characters, without thoughts, up to the first stop string."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longext.models.answers import begins_thought
from longext.models.hf import HFLanguageModel
from longext.models.turns import split_thought

OnText = Callable[[str], object]


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        text: what is new, without a thought that was taken off and without what ended it.
        tokens: all that is new.
        num_read: tokens before it.
        tokens_per_second: after the first new token.
        memory: slots, bytes, ratio, thinned and forgotten tokens of a memory; None for a plain model.
        num_thought_tokens: of the thought that was taken off.
    """

    text: str
    tokens: tuple[int, ...]
    num_read: int
    tokens_per_second: float
    memory: dict[str, Any] | None
    num_thought_tokens: int = 0


class TextStream:
    """Turns tokens into pieces of text as soon as they are whole characters and no part of a stop string.

    A token is decoded together with its predecessors, since spaces and characters may depend on them. Ending tokens
    and thoughts (see `split_thought`) make no text.

    Args:
        model: whose tokens they are.
        on_text: told each piece.
        marks: texts around a thought that is taken off, None for none.
        prompt: the tokens before the first.
        stop: texts that end the text; they are left out. They count behind a thought.

    Attributes:
        tokens: so far.
        said: the pieces told; together they are the text.
        is_over: a stop string has come.
    """

    def __init__(
        self,
        model: HFLanguageModel,
        on_text: OnText = lambda text: None,
        marks: tuple[str, str] | None = None,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self._model, self._on_text, self._ends = model, on_text, model.ending_tokens
        self._marks, self._is_begun = marks, marks is not None and begins_thought(model, prompt, marks)
        self._may_be_thought = marks is not None
        self._stop, self._kept_back = tuple(filter(None, stop)), ""
        self.num_thought = 0
        self._context, self._told = 0, 0  # decoding starts at the one; tokens before the other have been told
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.said: list[str] = []
        self.is_over = False

    def add(self, token: int) -> bool:
        """Take a token, tell the text it completes, and return `is_over`."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        if self._marks and self._may_be_thought:
            self._find_thought(self._marks)
        if not self._may_be_thought:
            self._tell(is_last=False)
        return self.is_over

    def end(self) -> None:
        """Tell what is left, whole or not."""
        if self._marks and self._may_be_thought:
            self.num_thought, _ = split_thought(self._raw, self.tokens, self._marks, self._is_begun)
            self._context = self._told = self.num_thought
            self._may_be_thought = False
        self._tell(is_last=True)

    def _find_thought(self, marks: tuple[str, str]) -> None:
        """Decide, as soon as it can be told, what of the tokens so far is a thought."""
        text = self._raw(self.tokens)
        begun = text.lstrip()
        if marks[1] in text:
            self.num_thought, _ = split_thought(self._raw, self.tokens, marks, self._is_begun)
            self._context = self._told = self.num_thought
        elif self._is_begun or begun.startswith(marks[0]) or marks[0].startswith(begun):
            return
        self._may_be_thought = False

    def _raw(self, ids: Sequence[int]) -> str:
        return str(self._model.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([token for token in ids if token not in self._ends])

    def _tell(self, is_last: bool) -> None:
        known = self._decode(self.tokens[self._context : self._told])
        text = self._decode(self.tokens[self._context :])
        if len(text) > len(known) and (is_last or not text.endswith("\ufffd")):
            self._say(text[len(known) :], is_last)
            self._context, self._told = self._told, len(self.tokens)
        elif is_last:
            self._say("", is_last)

    def _say(self, new: str, is_last: bool) -> None:
        """Tell text up to the first stop string, and keep back what may be the beginning of one."""
        if self.is_over:
            return
        text = self._kept_back + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.is_over, keep = True, min(found)
        elif is_last:
            keep = len(text)
        else:
            keep = min((_beginning(text, stop) for stop in self._stop), default=len(text))
        self._kept_back = text[keep:]
        if text[:keep]:
            self.said.append(text[:keep])
            self._on_text(text[:keep])

    @property
    def text(self) -> str:
        """What has been told."""
        return "".join(self.said)

    @property
    def tokens_per_second(self) -> float:
        """The rate after the first token; 0 if there is none."""
        seconds = self.times[-1] - self.times[0] if self.times else 0.0
        return (len(self.times) - 1) / seconds if seconds else 0.0

    def result(self, num_read: int, memory: dict[str, Any] | None) -> Generated:
        """Return what was written."""
        return Generated(self.text, tuple(self.tokens), num_read, self.tokens_per_second, memory, self.num_thought)


def _beginning(text: str, stop: str) -> int:
    """Return where the longest end of `text` starts that `stop` begins with; the length of `text` if none does."""
    starts = range(max(0, len(text) - len(stop) + 1), len(text))
    return next((start for start in starts if stop.startswith(text[start:])), len(text))
