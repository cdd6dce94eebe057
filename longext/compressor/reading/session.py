"""One document read through memory: tokens come in, full segments are compressed, the rest is read raw.

Shape legend: l tokens of a segment, k = l / ratio slots, M slots in memory, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longext.compressor.base import REPEAT, Compressor, CompressorSpec, Segment
from longext.compressor.checkpoint import LoadedCompressor
from longext.compressor.decoding import CachedDecoder, memory_decoder
from longext.compressor.memory import Memory, join, num_bytes, num_slots
from longext.compressor.memory_file import TOKENS, check_memory, hash_weights, read_memory, write_memory
from longext.compressor.ratios import find_ratio, num_memories
from longext.compressor.rotation import check_rotation, rerotate
from longext.compressor.sampling import Sampler
from longext.errors import CheckpointError, ConfigError
from longext.models.turns import ending_tokens, named_ends
from longext.training.losses import IGNORED

_DROPPED_AT_ONCE = 4  # one in so many memories makes room when the window is full
OVERFLOWS = ("slide", "error")


@dataclass(frozen=True)
class _State:
    """What a session knows of its document; replaced, never changed, so that an old one stays valid.

    Attributes:
        memory: [sink | memories], the sink for `kv` alone.
        sink: the document's first tokens, once segment 0 is compressed.
        before: raw tokens in front of the tail that stay readable (the overlap).
        tail: raw tokens of the unfinished segment.
        num_segments: compressed so far, forgotten ones included.
        num_tokens: absorbed so far.
    """

    memory: Memory = ()
    sink: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    num_segments: int = 0
    num_tokens: int = 0


class Session:
    """A stream of tokens that is compressed as it is read, and continued or asked about at any point.

    The raw tail grows to l tokens; the token after them turns them into k slots of memory. What can be read is then
    [sink | memories | overlap | tail], as in training, and the decoder never runs over what is only compressed.

    Args:
        compressor: a trained compressor.
        ratio: of the memories, one it was trained on; any divisor of the segment where its ratios nest. None takes its
            first.
        overflow: when memories fill the model's window: "slide" forgets the oldest quarter and moves the others up,
            "error" refuses the tokens.
        base_weights: hash of the frozen model's weights, needed to save.
        ends: tokens that end what is generated (default: those that the model itself names).

    Raises:
        ConfigError: a ratio or overflow that cannot be.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: int | None = None,
        overflow: str = "slide",
        base_weights: str = "",
        ends: Collection[int] | None = None,
    ) -> None:
        if overflow not in OVERFLOWS:
            raise ConfigError(f"overflow must be {' or '.join(OVERFLOWS)}, got '{overflow}'.")
        self.compressor = compressor
        self.ratio = find_ratio(compressor, ratio)
        self.overflow = overflow
        self.base_weights = base_weights
        self.eos = named_ends(compressor.backbone.model) if ends is None else frozenset(ends)
        self._segment_slots = compressor.slots(self.ratio)
        self._room = num_memories(compressor, self.ratio)
        self._can_rotate = compressor.is_soft
        self.reset()

    @classmethod
    def of(cls, loaded: LoadedCompressor, *, ratio: int | None = None, overflow: str = "slide") -> Session:
        """Return an empty session of a compressor from disk."""
        ends = ending_tokens(loaded.compressor.backbone.model, loaded.tokenizer)
        return cls(loaded.compressor, ratio=ratio, overflow=overflow, base_weights=loaded.base.weights, ends=ends)

    @property
    def spec(self) -> CompressorSpec:
        """The compressor's sizes."""
        return self.compressor.spec

    @property
    def memory(self) -> Memory:
        """The tensors that stand for the compressed text: for `kv` the sink's keys and values first."""
        return self._state.memory

    @property
    def num_tokens(self) -> int:
        """Tokens absorbed so far."""
        return self._state.num_tokens

    @property
    def num_slots(self) -> int:
        """Slots of memory held now; the sink is none."""
        return num_slots(self._state.memory) - self._num_fixed

    @property
    def num_bytes(self) -> int:
        """Bytes that the memory (with the sink's keys and values) holds on to."""
        return num_bytes(self._state.memory)

    @property
    def num_forgotten(self) -> int:
        """Tokens whose memories were dropped to make room."""
        handed_on = self.compressor.reads_last
        return 0 if handed_on else (self._state.num_segments - self._num_memories) * self.spec.segment

    @property
    def limit(self) -> int | None:
        """The most tokens that can be absorbed; None where the window slides or memory does not grow."""
        if self.overflow == "slide" or self.compressor.reads_last:
            return None
        return (self._room + self.spec.first_reader) * self.spec.segment

    # --- reading ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything and start a new document."""
        self._state = _State()
        self._decoder: CachedDecoder | None = None
        self._logits: torch.Tensor | None = None
        self._num_read = 0

    @torch.no_grad()
    def absorb(self, ids: Sequence[int] | torch.Tensor, advance: Callable[[int], object] | None = None) -> None:
        """Add tokens to the document; segments that are full and followed by another token are compressed.

        Args:
            ids: token ids [n]; REPEAT (-1) stands for the trained "repeat the text" vector.
            advance: told the number of tokens each time some have been compressed.

        Raises:
            ConfigError: an id that is not one of the model's, or more tokens than `limit`; nothing is absorbed then.
        """
        tokens, state = self._checked(ids), self._state
        text = (*state.tail, *tokens)
        count = max(0, len(text) - 1) // self.spec.segment
        try:
            if count:
                self._compress(text, count, advance or (lambda _: None))
        except BaseException:
            self._state = state
            raise
        rest = text[count * self.spec.segment :]
        self._state = dataclasses.replace(self._state, tail=rest, num_tokens=state.num_tokens + len(tokens))

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Return the logits [V] of the token that follows.

        Tokens since the last call are read on top of what is cached; after a compression the cache is built anew.

        Raises:
            ConfigError: nothing has been absorbed.
        """
        state = self._state
        if not state.tail:
            raise ConfigError("There is nothing to continue: absorb at least one token first.")
        unread = state.tail[self._num_read :]
        if self._decoder is None:
            self._decoder = self._new_decoder()
            unread = (*state.before, *state.tail)
        if unread or self._logits is None:
            self._logits = self._decoder.next_logits(self._ids(unread))[0]
            self._num_read = len(state.tail)
        return self._logits

    def _new_decoder(self) -> CachedDecoder:
        """Return a decoder behind what the current segment reads, with room for the rest of the segment."""
        state = self._state
        room = len(state.before) + self.spec.segment
        return memory_decoder(self.compressor, self._ids(state.sink), self._readable(), self.ratio, room)

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int], object] | None = None,
    ) -> list[int]:
        """Continue the document: absorb and return new tokens, up to and with an ending token.

        Args:
            temperature, top_p, seed: as `Sampler`; 0 is greedy.
            on_token: told each token as it comes.

        Raises:
            ConfigError: nothing has been absorbed, a value out of range, or `limit` is reached.
        """
        sampler = Sampler(temperature, top_p, seed)
        new: list[int] = []
        while len(new) < max_new_tokens and not (new and new[-1] in self.eos):
            new.append(sampler.choose(self.logits()))
            self.absorb(new[-1:])
            if on_token is not None:
                on_token(new[-1])
        return new

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
        if self._state.tail:
            self.logits()  # what is read once here need not be read again for every question
        state, decoder, num_read, logits = self._state, self._decoder, self._num_read, self._logits
        length = decoder.length if decoder else 0
        try:
            yield
        finally:
            self._state, self._decoder, self._num_read, self._logits = state, decoder, num_read, logits
            if decoder:
                decoder.truncate(length)

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the session to one .safetensors file, from which `load` goes on."""
        assert self.base_weights, "a session that is saved must know its model: use Session.of"
        state = self._state
        description = {
            "spec": self.spec.to_json(),
            "ratio": self.ratio,
            "base_weights": self.base_weights,
            "compressor": hash_weights(self.compressor),
            "num_segments": state.num_segments,
            "num_tokens": state.num_tokens,
        }
        tokens = {name: list(getattr(state, name)) for name in TOKENS}
        write_memory(Path(path), state.memory, tokens, description)

    @classmethod
    def load(cls, path: str | Path, loaded: LoadedCompressor, *, overflow: str = "slide") -> Session:
        """Return the session that `save` wrote.

        Raises:
            CheckpointError: not a memory file, or one that another compressor or another base model wrote.
        """
        memory, tokens, description = read_memory(Path(path))
        if not loaded.base.is_that_of(description["base_weights"]):
            raise CheckpointError(
                f"{path} was written on another base model than {loaded.base.name}; it cannot be read."
            )
        spec, own = CompressorSpec.from_json(description["spec"]), loaded.compressor.spec
        if spec != own or description["compressor"] != hash_weights(loaded.compressor):
            raise CheckpointError(
                f"{path} was written by another compressor ({spec.arch}, segments of {spec.segment}) than "
                f"{loaded.directory} ({own.arch}, segments of {own.segment}), or before it was trained further: only "
                "the one that wrote a memory can read it."
            )
        session = cls.of(loaded, ratio=description["ratio"], overflow=overflow)
        backbone = loaded.compressor.backbone
        check_memory(Path(path), memory, loaded.compressor, description["num_segments"])
        session._state = _State(
            memory=tuple(tensor.to(backbone.device, backbone.dtype) for tensor in memory),
            **{name: tuple(session._checked(ids)) for name, ids in tokens.items()},
            num_segments=description["num_segments"],
            num_tokens=description["num_tokens"],
        )
        return session

    # --- compressing ------------------------------------------------------------------------------------------------

    @property
    def _num_fixed(self) -> int:
        return 0 if self.compressor.is_soft else len(self._state.sink)

    @property
    def _num_memories(self) -> int:
        return self.num_slots // self._segment_slots

    def _num_hidden(self, segment: int) -> int:
        """Return how many of the memories before a segment are not read, because the overlap holds their text."""
        return segment - self.spec.num_visible(segment)

    def _readable(self) -> Memory:
        """Return what the current segment reads: sink and memories, without those of text in the overlap."""
        state = self._state
        if not state.num_segments:
            return ()
        stop = num_slots(state.memory) - self._num_hidden(state.num_segments) * self._segment_slots
        return tuple(tensor[..., :stop, :] for tensor in state.memory)

    def _checked(self, ids: Sequence[int] | torch.Tensor) -> list[int]:
        tokens = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else list(ids)
        size = self.compressor.backbone.embedding.weight.shape[0]
        wrong = next((token for token in tokens if not (0 <= token < size or token == REPEAT)), None)
        if wrong is not None:
            raise ConfigError(f"Token id {wrong} is none of the model's {size:,}.")
        if self.limit is not None and self.num_tokens + len(tokens) > self.limit:
            raise ConfigError(
                f"At ratio {self.ratio} the model's {self.compressor.backbone.window:,} positions hold documents of at "
                f'most {self.limit:,} tokens: raise the ratio, extend the model, or let it slide (overflow="slide").'
            )
        return tokens

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return int64 [1, n] where the model is."""
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self.compressor.backbone.device)

    def _compress(self, text: Sequence[int], count: int, advance: Callable[[int], object]) -> None:
        """Write the first `count` segments of `text` (the tail and what follows it) to memory."""
        state, length, overlap = self._state, self.spec.segment, self.spec.overlap
        if not state.num_segments:
            sink = tuple(text[: self.spec.sink])
            memory = join([self.compressor.fixed(self._ids(sink))])
            self._state = dataclasses.replace(state, sink=sink, memory=memory)
        known, offset = (*state.before, *text), len(state.before)
        segments = [self._make_segment(known, offset + i * length, state.num_segments + i) for i in range(count)]
        if self.compressor.recurrent:
            self._write_in_turn(segments, advance)
        else:
            self._write_together(segments, advance)
        end = offset + count * length
        self._state = dataclasses.replace(self._state, before=tuple(known[end - min(overlap, end) : end]), tail=())
        self._decoder, self._logits, self._num_read = None, None, 0

    def _make_segment(self, known: Sequence[int], start: int, number: int) -> Segment:
        tokens = self._ids(known[start : start + self.spec.segment])
        before = self._ids(known[max(0, start - self.spec.overlap) : start])
        sink = self._ids(self._state.sink if number else ())
        return Segment(tokens, torch.full_like(tokens, IGNORED), before, sink, self.ratio)

    def _write_in_turn(self, segments: Sequence[Segment], advance: Callable[[int], object]) -> None:
        """Write segments one after the other, each given the memories before it."""
        for segment in segments:
            if not self.compressor.reads_last:
                self._drop(self._num_excess(1))
            made = self.compressor.write(segment, self._readable(), num_slots(self.memory))
            self._store([made], 1)
            if self.compressor.reads_last:
                self._drop(self._num_memories - 1 - self._num_hidden(self._state.num_segments))
            advance(self.spec.segment)

    def _write_together(self, segments: Sequence[Segment], advance: Callable[[int], object]) -> None:
        """Write segments that depend on no other, many in a pass; those that would be dropped at once are left out."""
        held, excess = self._num_memories, self._num_excess(len(segments))
        skipped = max(0, excess - held)
        self._drop(min(excess, held))
        first, made = num_slots(self.memory), list[Memory]()
        advance(skipped * self.spec.segment)
        kept = segments[skipped:]
        slots = [first + i * self._segment_slots for i in range(len(kept))]
        for memory in self.compressor.write_all(kept, slots):
            made.append(memory)
            advance(self.spec.segment)
        self._store(made, len(segments))

    def _store(self, made: Sequence[Memory], num_segments: int) -> None:
        """Append memories; joining copies them, so that nothing larger is kept alive."""
        memory, total = join([self.memory, *made]), self._state.num_segments + num_segments
        self._state = dataclasses.replace(self._state, memory=memory, num_segments=total)

    def _num_excess(self, new: int) -> int:
        """Return how many of the oldest memories go when `new` are written: blocks, so that keys seldom move."""
        held, dropped = self._num_memories, 0
        for number in range(self._state.num_segments + 1, self._state.num_segments + new + 1):
            held += 1
            if held - self._num_hidden(number) > self._room:
                block = -(-self._room // _DROPPED_AT_ONCE)
                held, dropped = held - block, dropped + block
        return dropped

    def _drop(self, count: int) -> None:
        """Forget the `count` oldest memories; the keys of the others move to the positions that are free then."""
        if count <= 0:
            return
        if not self._can_rotate:
            check_rotation(self.compressor.backbone)
            self._can_rotate = True
        slots = count * self._segment_slots
        fixed = tuple(tensor[..., : self._num_fixed, :] for tensor in self.memory)
        rest = tuple(tensor[..., self._num_fixed + slots :, :] for tensor in self.memory)
        if not self.compressor.is_soft:
            rest = rerotate(self.compressor.backbone, rest, -slots)
        self._state = dataclasses.replace(self._state, memory=join([fixed, rest]))
