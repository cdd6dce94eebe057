"""A text of tokens that is read and continued: what a session of any kind does, whatever it keeps of the text.

Shape legend: B rows, n tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longext.compressor.segments import REPEAT
from longext.errors import ConfigError
from longext.models.decode import Sampler, step_rows

Advance = Callable[[int], object]
IsOver = Callable[[int, int], bool]


def silent(amount: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen: the arguments of `Sampler`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Continued(ABC):
    """A text that goes on.

    Attributes:
        eos: tokens that end what is generated.
        num_tokens: absorbed so far.
        num_computed: tokens that have gone through the model so far, those read again included.
        takes_repeat: the text may hold REPEAT, which only a compressor has a vector for.
        when_full: what happens when there is no more room: "thin", "forget", "refuse"; "" if what is kept is bounded.
    """

    eos: Collection[int] = frozenset()
    num_tokens = 0
    num_computed = 0
    takes_repeat = False
    when_full = ""

    # --- what a kind of text defines --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where tokens go."""

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """How many token ids the model knows."""

    @property
    def limit(self) -> int | None:
        """The most tokens that can be absorbed; None if there is always room."""
        return None

    @abstractmethod
    def reset(self) -> None:
        """Forget everything and start a new text."""

    @abstractmethod
    def add(self, tokens: torch.Tensor, advance: Advance = silent) -> None:
        """Take tokens, int64 [B, n]; `advance` is told how many have just been read."""

    @abstractmethod
    def next_logits(self) -> torch.Tensor:
        """Return the logits [B, V] of what follows (LongextError if they are not numbers)."""

    @abstractmethod
    def mark(self) -> Any:
        """Return what `restore` takes to make the text again what it is now; what was read stays read."""

    @abstractmethod
    def restore(self, mark: Any) -> None:
        """Undo whatever came after `mark`."""

    @abstractmethod
    def rows(self, count: int) -> contextlib.AbstractContextManager[None]:
        """Be `count` equal texts, that can go on in different ways; one again, as before, on leaving."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return how much is kept: num_slots, num_bytes, and what was thinned or forgotten."""

    @abstractmethod
    def positions(self) -> tuple[int, int]:
        """Return (how many of the model's positions the text takes now, how many there are)."""

    def expect(self, question: Sequence[int]) -> None:
        """Learn how the prompt ends before anything is absorbed; only query-aware policies take notice."""
        return

    def refusal(self, num_tokens: int) -> str:
        """Return what to say where `num_tokens` are more than `limit`."""
        return f"{num_tokens:,} tokens are more than the {self.limit:,} that there is room for."

    # --- what all do ------------------------------------------------------------------------------------------------

    def absorb(self, ids: Sequence[int] | torch.Tensor, advance: Advance = silent) -> None:
        """Add tokens to the text.

        Args:
            ids: token ids [n], or [B, n] for rows; REPEAT (-1) is a compressor's trained "repeat the text" vector.
            advance: told the number of tokens each time some have been read.

        Raises:
            ConfigError: an id that is not one of the model's, or more tokens than `limit`; nothing is absorbed then.
        """
        tokens = self.checked(ids)
        self.add(tokens, advance)
        self.num_tokens += tokens.shape[1]

    def checked(self, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return token ids as int64 [B, n] on the model's device (ConfigError as `absorb`)."""
        tokens = ids if isinstance(ids, torch.Tensor) else torch.tensor(list(ids), dtype=torch.int64)
        tokens = tokens.to(torch.int64).reshape(-1, tokens.shape[-1]) if tokens.numel() else tokens.reshape(1, 0).long()
        wrong = next((t for t in tokens.flatten().tolist() if not self._is_token(t)), None)
        if wrong is not None:
            raise ConfigError(f"Token id {wrong} is none of the model's {self.num_ids:,}.")
        if self.limit is not None and self.num_tokens + tokens.shape[1] > self.limit:
            raise ConfigError(self.refusal(self.num_tokens + tokens.shape[1]))
        return tokens.to(self.device)

    def _is_token(self, token: int) -> bool:
        return 0 <= token < self.num_ids or (self.takes_repeat and token == REPEAT)

    def logits(self) -> torch.Tensor:
        """Return the logits [V] of the token that follows.

        Raises:
            ConfigError: nothing has been absorbed.
        """
        if not self.num_tokens:
            raise ConfigError("There is nothing to continue: absorb at least one token first.")
        return self.next_logits()[0]

    def steps(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        choice: Choice = Choice(),
        *,
        is_over: IsOver = lambda row, token: False,
        advance: Advance = silent,
    ) -> Iterator[list[int | None]]:
        """Absorb one prompt for each row, continue all together, and yield the new token of each (see `step_rows`).

        Each row draws as it would alone. Within `rows`, unless there is one prompt.

        Args:
            count: new tokens of a row at most.
            advance: told of the prompt's tokens.
        """
        shared = min(map(len, prompts))
        if shared:
            self.absorb(torch.tensor([list(prompt[:shared]) for prompt in prompts]), advance)
        if not self.num_tokens:
            raise ConfigError("There is nothing to continue: absorb at least one token first.")
        samplers = [Sampler(choice.temperature, choice.top_p, choice.seed) for _ in prompts]
        given = [prompt[shared:] for prompt in prompts]
        choose = samplers if choice.temperature else samplers[0]  # the best token of each row needs no turns
        yield from step_rows(self.next_logits, self.absorb, count, self.eos, choose, given=given, is_over=is_over)

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int], object] = lambda _: None,
    ) -> list[int]:
        """Continue the text: absorb and return new tokens, up to and with an ending token.

        Args:
            temperature, top_p, seed: as `Sampler`; 0 is greedy.
            on_token: told each token as it comes.

        Raises:
            ConfigError: nothing has been absorbed, a value out of range, or `limit` is reached.
        """
        new: list[int] = []
        for (token,) in self.steps([[]], max_new_tokens, Choice(temperature, top_p, seed)):
            assert token is not None
            new.append(token)
            on_token(token)
        return new

    def ask(
        self, question: Sequence[int] | torch.Tensor, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[int]:
        """Return the continuation of text + question [n]; the text stays as it was, ready for the next one."""
        with self.snapshot():
            self.absorb(question)
            return self.generate(max_new_tokens, temperature=temperature, seed=seed)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Undo on leaving whatever is absorbed or generated inside."""
        mark, num_tokens = self.mark(), self.num_tokens
        try:
            yield
        finally:
            self.restore(mark)
            self.num_tokens = num_tokens
