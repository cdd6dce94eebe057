"""One document read through memory: tokens come in, full segments are compressed, the rest is read raw.

Shape legend: l tokens of a segment, k = l / ratio slots, M slots in memory, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch

from longext.compressor.base import Compressor
from longext.compressor.checkpoint import LoadedCompressor
from longext.compressor.memory import Memory, num_bytes, num_slots
from longext.compressor.reading.memory_file import (
    TOKENS,
    check_held,
    check_memory,
    hash_weights,
    read_memory,
    write_memory,
)
from longext.compressor.reading.trails import CompressorTrail, Stream, TrailState
from longext.compressor.schedule import WHEN_FULL, Ratio, spelled
from longext.compressor.segments import REPEAT
from longext.compressor.spec import CompressorSpec
from longext.errors import CheckpointError, ConfigError
from longext.models.decode import Sampler, continue_rows
from longext.models.turns import ending_tokens, named_ends

_PARTS = 4  # memories that leave do so one in so many at once: keys seldom move


class Session(Stream):
    """A stream of tokens that is compressed as it is read, and continued or asked about at any point.

    The raw tail grows to l tokens; the token after them turns them into k slots of memory. What can be read is then
    [sink | memories | overlap | tail], as in training, and the decoder never runs over what is only compressed.

    Args:
        compressor: a trained compressor.
        ratio: of the memories, one it was trained on; any divisor of the segment, or several by distance (2, 4, 8), if
            its ratios nest. None takes its first.
        when_full: when memories fill the model's window: "thin" keeps every second slot of far memories, again and
            again, and forgets the oldest only where one slot is left of each; "forget" drops the oldest quarter;
            "refuse" refuses the tokens. None: "thin" if its ratios nest, else "forget".
        base_weights: hash of the frozen model's weights, needed to save.
        ends: tokens that end what is generated (default: those that the model itself names).

    Raises:
        ConfigError: a ratio or `when_full` that cannot be.
    """

    trail: CompressorTrail

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: Ratio | None = None,
        when_full: str | None = None,
        base_weights: str = "",
        ends: Collection[int] | None = None,
    ) -> None:
        self.compressor = compressor
        self.ratio = compressor.find_ratio(ratio)
        self.when_full = check_when_full(compressor, when_full)
        self.base_weights = base_weights
        self.eos = named_ends(compressor.backbone.model) if ends is None else frozenset(ends)
        self.reset()

    @classmethod
    def of(cls, loaded: LoadedCompressor, *, ratio: Ratio | None = None, when_full: str | None = None) -> Session:
        """Return an empty session of a compressor from disk."""
        ends = ending_tokens(loaded.compressor.backbone.model, loaded.tokenizer)
        weights = loaded.base.weights
        return cls(loaded.compressor, ratio=ratio, when_full=when_full, base_weights=weights, ends=ends)

    @property
    def spec(self) -> CompressorSpec:
        """The compressor's sizes."""
        return self.compressor.spec

    @property
    def memory(self) -> Memory:
        """The tensors that represent the compressed text: for `kv` the sink's keys and values first."""
        return self.trail.state.memory

    @property
    def num_slots(self) -> int:
        """Slots of memory kept now; the sink is none."""
        return num_slots(self.memory) - self.trail.num_fixed

    @property
    def num_bytes(self) -> int:
        """Bytes that the memory (with the sink's keys and values) holds on to."""
        return num_bytes(self.memory)

    @property
    def num_forgotten(self) -> int:
        """Tokens whose memories were dropped to make room."""
        return 0 if self.compressor.reads_last else self.trail.state.first * self.segment

    @property
    def num_thinned(self) -> int:
        """Tokens whose memories were thinned, to a higher ratio than asked for, to make room."""
        asked = self.trail.schedule.ratios[-1]
        return sum(self.segment for ratio in self.trail.state.ratios if ratio > asked)

    @property
    def limit(self) -> int | None:
        """The most tokens that can be absorbed; None if memories make room or memory does not grow."""
        if self.when_full != "refuse" or self.compressor.reads_last:
            return None
        return self.trail.schedule.max_segments * self.segment

    # --- reading ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything and start a new document."""
        trail = CompressorTrail(self.compressor, self.ratio, parts=_PARTS, thins=self.when_full == "thin")
        super().__init__(trail, self.spec.segment)
        self.num_tokens = 0  # absorbed so far

    def absorb(self, ids: Sequence[int] | torch.Tensor, advance: Callable[[int], object] = lambda _: None) -> None:
        """Add tokens to the document; segments that are full and followed by another token are compressed.

        Args:
            ids: token ids [n]; REPEAT (-1) is the trained "repeat the text" vector.
            advance: told the number of tokens each time some have been compressed.

        Raises:
            ConfigError: an id that is not one of the model's, or more tokens than `limit`; nothing is absorbed then.
        """
        tokens, state = self._checked(ids), self.trail.state
        try:
            self.add(self._ids(tokens), advance)
        except BaseException:
            self.trail.state = state
            raise
        self.num_tokens += len(tokens)

    def _go_past(self, tokens: torch.Tensor, advance: Callable[[int], object]) -> None:
        """Compress segments, many in a pass if their memories depend on no other; what would not fit is left out."""
        left = tokens.shape[1]

        def tell(amount: int) -> None:
            nonlocal left
            left -= amount
            advance(amount)

        self.trail.write(tokens, tell)
        self.trail.settle(tell)
        if left:
            advance(left)

    def logits(self) -> torch.Tensor:
        """Return the logits [V] of the token that follows.

        Raises:
            ConfigError: nothing has been absorbed.
        """
        if not self.num_tokens:
            raise ConfigError("There is nothing to continue: absorb at least one token first.")
        return self.next_logits()[0]

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int], object] = lambda _: None,
    ) -> list[int]:
        """Continue the document: absorb and return new tokens, up to and with an ending token.

        Args:
            temperature, top_p, seed: as `Sampler`; 0 is greedy.
            on_token: told each token as it comes.

        Raises:
            ConfigError: nothing has been absorbed, a value out of range, or `limit` is reached.
        """

        def take(tokens: torch.Tensor) -> None:
            self.absorb(tokens)
            on_token(int(tokens))

        choose = Sampler(temperature, top_p, seed)
        return continue_rows(lambda: self.logits()[None], take, max_new_tokens, self.eos, choose)[0]

    def ask(
        self, question: Sequence[int] | torch.Tensor, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[int]:
        """Return the continuation of document + question [n]; the session stays as it was, ready for the next one."""
        with self.snapshot():
            self.absorb(question)
            return self.generate(max_new_tokens, temperature=temperature, seed=seed)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Undo on leaving whatever is absorbed or generated inside."""
        if self.num_tokens:
            self.logits()  # what is read once here need not be read again for every question
        before = {name: getattr(self, name) for name in ("tail", "num_tokens", "_decoder", "_logits", "_num_read")}
        state, decoder = self.trail.state, self._decoder
        length = decoder.length if decoder else 0
        try:
            yield
        finally:
            self.trail.state = state
            vars(self).update(before)
            if decoder:
                decoder.truncate(length)

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the session to one .safetensors file, from which `load` goes on."""
        assert self.base_weights, "a session that is saved must know its model: use Session.of"
        state = self.trail.state
        description = {
            "spec": self.spec.to_json(),
            "ratios": list(self.trail.schedule.ratios),
            "when_full": self.when_full,
            "first": state.first,
            "held": list(state.ratios),
            "base_weights": self.base_weights,
            "compressor": hash_weights(self.compressor),
            "num_segments": state.num_segments,
            "num_tokens": self.num_tokens,
        }
        tokens = {"sink": state.sink, "before": self.trail.overlap, "tail": self.tail}
        lists = {name: [] if ids is None else ids[0].tolist() for name, ids in tokens.items()}
        write_memory(Path(path), state.memory, lists, description)

    @classmethod
    def load(cls, path: str | Path, loaded: LoadedCompressor) -> Session:
        """Return the session that `save` wrote.

        Raises:
            CheckpointError: not a memory file, or one that another compressor or another base model wrote.
        """
        memory, tokens, description = read_memory(Path(path))
        if not loaded.base.is_that_of(description["base_weights"]):
            raise CheckpointError(
                f"{path} was written on another base model than {loaded.base.name}; it cannot be read."
            )
        spec, expected = CompressorSpec.from_json(description["spec"]), loaded.compressor.spec
        if spec != expected or description["compressor"] != hash_weights(loaded.compressor):
            raise CheckpointError(
                f"{path} was written by another compressor ({spec.arch}, segments of {spec.segment}) than "
                f"{loaded.directory} ({expected.arch}, segments of {expected.segment}), or before it was trained "
                "further: only the one that wrote a memory can read it."
            )
        ratios, count = description["ratios"], description["num_segments"]
        session = cls.of(loaded, ratio=tuple(ratios), when_full=description["when_full"])
        schedule, first, held = session.trail.schedule, description["first"], tuple(description["held"])
        check_held(Path(path), held, first, count, spec.segment)
        end = schedule.places(held)[-1]
        check_memory(Path(path), memory, loaded.compressor, end if count else 0)
        sink, before, tail = (session._ids(session._checked(tokens[name])) for name in TOKENS)
        if count:
            backbone = loaded.compressor.backbone
            memory = tuple(tensor.to(backbone.device, backbone.dtype) for tensor in memory)
            positions = torch.arange(schedule.fixed, end)
            session.trail.state = TrailState(count, sink, before, memory, first, held, positions)
        session.tail = tail if tail.shape[1] else None
        session.num_tokens = description["num_tokens"]
        return session

    def _checked(self, ids: Sequence[int] | torch.Tensor) -> list[int]:
        tokens = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else list(ids)
        size = self.compressor.backbone.embedding.weight.shape[0]
        wrong = next((token for token in tokens if not (0 <= token < size or token == REPEAT)), None)
        if wrong is not None:
            raise ConfigError(f"Token id {wrong} is none of the model's {size:,}.")
        if self.limit is not None and self.num_tokens + len(tokens) > self.limit:
            raise ConfigError(
                f"At ratio {spelled(self.ratio)} the model's {self.compressor.backbone.window:,} positions hold "
                f"documents of at most {self.limit:,} tokens: raise the ratio, extend the model, or let memories make "
                'room (when_full="thin").'
            )
        return tokens

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return int64 [1, n] on the model's device."""
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self.compressor.backbone.device)


def check_when_full(compressor: Compressor, when_full: str | None) -> str:
    """Return what happens when memories fill the window; None for the default.

    Raises:
        ConfigError: an unknown name, or memories that cannot be thinned.
    """
    if when_full is None:
        return "thin" if compressor.nested else "forget"
    if when_full not in WHEN_FULL:
        raise ConfigError(f"when_full must be {', '.join(WHEN_FULL[:-1])} or {WHEN_FULL[-1]}, got '{when_full}'.")
    if when_full == "thin" and not compressor.nested:
        raise ConfigError(f"Memories of {compressor.spec.arch} cannot be thinned: use when_full='forget' or 'refuse'.")
    return when_full
