"""What is kept of a text that is read segment by segment: raw tokens, or compressed memories (keys: `eviction`).

Shape legend: B texts, l tokens of a segment, n tokens read, D hidden size, k slots of a segment's memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor
from longext.compressor.memory import Memory, join
from longext.compressor.reading.decoder import CachedDecoder, last_logits, memory_decoder
from longext.compressor.schedule import Ratio, kept_slots
from longext.compressor.segments import Segment


class Trail(ABC):
    """What B texts leave behind, in turns of `read` (score a segment) and `write` (go past it).

    Attributes:
        backbone: the frozen model.
        state: what is left of the texts; replaced, never changed, so that an old one can be put back.
        holds_cache: what `begin` returns keeps its keys in this trail, and so cannot go on once another has begun.
    """

    backbone: Backbone
    state: Any
    holds_cache = False

    @abstractmethod
    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [B, n, D] of the next segment or its beginning, int64 [B, n]; keep nothing."""

    @abstractmethod
    def begin(self, tokens: torch.Tensor, room: int) -> tuple[CachedDecoder, torch.Tensor]:
        """Return what `read` returns, and a decoder to which the segment's further tokens are fed, `room` at most."""

    @abstractmethod
    def write(self, tokens: torch.Tensor) -> None:
        """Go past a whole segment, int64 [B, l]; it may be one that has just been read."""

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read a whole segment and go past it; return what `read` returns."""
        hidden = self.read(tokens)
        self.write(tokens)
        return hidden

    @abstractmethod
    def spread(self, count: int) -> None:
        """Turn one text into `count` equal ones."""

    def ask(self, tokens: torch.Tensor) -> None:
        """Learn the end of the prompt, int64 [B, n], before anything is read; most take no notice."""
        return


class WindowTrail(Trail):
    """The last `size` raw tokens, read again with every segment at positions from 0; nothing else is seen."""

    def __init__(self, backbone: Backbone, size: int) -> None:
        self.backbone, self.size = backbone, size
        self.state: torch.Tensor | None = None  # the tokens kept

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the frozen model over what is kept and the tokens."""
        return self.backbone.run(self.backbone.embed(self._with_past(tokens)))[:, -tokens.shape[1] :]

    def begin(self, tokens: torch.Tensor, room: int) -> tuple[CachedDecoder, torch.Tensor]:
        """Run the frozen model over what is kept and the tokens, with a cache."""
        decoder = CachedDecoder(self.backbone, room=room)
        return decoder, decoder.feed(self._with_past(tokens))[:, -tokens.shape[1] :]

    def write(self, tokens: torch.Tensor) -> None:
        """Keep the newest tokens."""
        self.state = _newest(self._with_past(tokens), self.size)

    def spread(self, count: int) -> None:
        """Repeat the tokens."""
        self.state = repeated(self.state, count)

    def _with_past(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self.state is None else torch.cat([self.state, tokens], 1)


@dataclass(frozen=True)
class TrailState:
    """What is left of the segments gone past; replaced, never changed, so that an old one stays valid.

    Attributes:
        num_segments: gone past, those included that have left.
        sink: int64 [B, s], the first tokens of the texts, once segment 0 is past.
        text: int64 [B, n], the newest tokens: the overlap, and the segments whose memories are not written yet.
        memory: [sink | memories `first` ...], the sink for `kv` alone.
        first: number of the oldest memory that is kept.
        ratios: of each memory that is kept.
        positions: of their slots, as their keys are rotated; int64 [slots].
    """

    num_segments: int = 0
    sink: torch.Tensor | None = None
    text: torch.Tensor | None = None
    memory: Memory = ()
    first: int = 0
    ratios: tuple[int, ...] = ()
    positions: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def last(self) -> int:
        """The number of the first memory that is not written."""
        return self.first + len(self.ratios)


class CompressorTrail(Trail):
    """Memories of the segments before, [sink | memories | overlap | segment], as a `Schedule` says.

    A memory is written at the ratio and positions it is read at; keys that move because older memories were thinned or
    have left are turned from where they were written, so each is rounded once. Memories that depend on no other are
    written when they are first read, many at a time.

    Args:
        ratio: of all memories, or several by distance.
        past: int64 [B, t l], tokens already gone past; recurrent memories of them are not written.
        parts: memories leave in blocks, one of so many parts at once, and keys then stay as they were turned: what is
            kept is all there is to save. None: one by one.
        thins: when the window is full, far memories are thinned out before any leaves.
    """

    state: TrailState

    def __init__(
        self,
        compressor: Compressor,
        ratio: Ratio,
        past: torch.Tensor | None = None,
        parts: int | None = None,
        *,
        thins: bool = False,
    ) -> None:
        self.compressor, self.backbone = compressor, compressor.backbone
        self.schedule = compressor.schedule(ratio, parts=parts, thins=thins)
        self.ratio = self.schedule.ratios[0]
        self.state = TrailState()
        self.settles = parts is not None
        self._may_turn = False
        if past is not None:
            self._go_past(past)

    @property
    def num_fixed(self) -> int:
        """Slots of the sink in front of the memories."""
        return self.schedule.fixed if self.state.num_segments else 0

    @property
    def overlap(self) -> torch.Tensor | None:
        """The raw tokens in front of the next segment that stay readable; None for the first."""
        text = self.state.text
        return None if text is None else _newest(text, self.schedule.overlap)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the reader over the memories and the segment."""
        return self.compressor.read(self._segment(tokens), self._readable())

    def begin(self, tokens: torch.Tensor, room: int) -> tuple[CachedDecoder, torch.Tensor]:
        """Run the reader over memories, overlap and the tokens, with a cache."""
        segment = self._segment(tokens)
        text = torch.cat([segment.before, tokens], 1)
        decoder = memory_decoder(self.compressor, segment.sink, self._readable(), self.ratio, text.shape[1] + room)
        return decoder, decoder.feed(text)[:, -tokens.shape[1] :]

    def read_with(self, tokens: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Return the last hidden states [B, n, D] with `memory` in the place of the text's own."""
        sink = tuple(t[..., : self.num_fixed, :] for t in self.state.memory) if self.num_fixed else ()
        return self.compressor.read(self._segment(tokens), join([sink, memory]))

    def memory(self) -> Memory:
        """Return the memories that the next segment reads, at the positions it reads them at, without the sink."""
        return tuple(t[..., self.num_fixed :, :] for t in self._readable())

    def write(self, tokens: torch.Tensor, advance: Callable[[int], object] = lambda _: None) -> None:
        """Go past whole segments, int64 [B, m l]; recurrent architectures write their memories now.

        Args:
            advance: told l when a memory has been written.
        """
        if not self.compressor.recurrent:
            self._go_past(tokens)
            return
        for part in tokens.split(self.schedule.segment, 1):
            t = self.state.num_segments
            first, last = self.schedule.writer_span(t)
            segment, memory = self._segment(part), self._at(first, last)
            place = self.schedule.places(self._wanted(first, t))[-1]
            written = self.compressor.write(segment, memory, place)
            self._go_past(part)
            self._add([written], [self.ratio], place)
            advance(self.schedule.segment)

    def spread(self, count: int) -> None:
        """Repeat what is left of the text."""
        state = self.state
        memory = tuple(tensor.expand(count, *tensor.shape[1:]) for tensor in state.memory)
        sink, text = repeated(state.sink, count), repeated(state.text, count)
        self.state = dataclasses.replace(state, sink=sink, text=text, memory=memory)

    def settle(self, advance: Callable[[int], object] = lambda _: None) -> None:
        """Write now what a later segment may read, memories of the overlap too; `advance` as in `write`."""
        last = self.state.num_segments
        self._at(self.schedule.first(last), last, advance)

    def _readable(self) -> Memory:
        """Return [sink | memories] as the next segment reads them; () for the first, which holds the sink itself."""
        return self._at(*self.schedule.span(self.state.num_segments))

    def _at(self, first: int, last: int, advance: Callable[[int], object] = lambda _: None) -> Memory:
        """Return [sink | memories first .. last - 1] at the ratios and positions of a segment that reads them."""
        self._drop(first)
        wanted = self._wanted(self.state.first, max(last, self.state.last))
        self._thin(wanted)
        if not self.compressor.recurrent:
            self._encode(last, wanted, advance)
        memory = self._turned()
        if self.settles:
            positions = self.num_fixed + torch.arange(len(self.state.positions))
            self.state = dataclasses.replace(self.state, memory=memory, positions=positions)
        end = self.schedule.places(wanted[: last - self.state.first])[-1]
        return tuple(tensor[..., :end, :] for tensor in memory)

    def _wanted(self, first: int, last: int) -> list[int]:
        """Return the ratios of memories first .. last - 1 for the next segment; a memory is never made denser."""
        state, reader = self.state, self.state.num_segments
        read = dict(zip(range(*self.schedule.span(reader)), self.schedule.ratios_at(reader), strict=True))
        held = dict(zip(range(state.first, state.last), state.ratios, strict=True))
        return [max(read.get(s, self.ratio), held.get(s, 1)) for s in range(first, last)]

    def _thin(self, wanted: list[int]) -> None:
        """Keep of every memory the slots that it has at its wanted ratio: the last of each stretch of slots."""
        state, length = self.state, self.schedule.segment
        if state.ratios == tuple(wanted[: len(state.ratios)]):
            return
        stay = torch.tensor(kept_slots(length, state.ratios, wanted), dtype=torch.int64)
        fixed = torch.arange(self.num_fixed)
        places = torch.cat([fixed, self.num_fixed + stay])
        memory = tuple(tensor[..., places.to(tensor.device), :] for tensor in state.memory)
        ratios = tuple(wanted[: len(state.ratios)])
        self.state = dataclasses.replace(state, memory=memory, ratios=ratios, positions=state.positions[stay])

    def _turned(self) -> Memory:
        """Return [sink | memories] with the slots at the positions behind the sink, in a row."""
        state = self.state
        deltas = self.num_fixed + torch.arange(len(state.positions)) - state.positions
        if self.compressor.is_soft or not bool(deltas.any()):
            return state.memory
        if not self._may_turn:
            self.backbone.check_rotation()
            self._may_turn = True
        return self.backbone.rerotate(state.memory, torch.cat([torch.zeros(self.num_fixed, dtype=torch.int64), deltas]))

    def _drop(self, first: int) -> None:
        """Forget the memories before `first`; the others keep their rotation."""
        state = self.state
        gone = min(first - state.first, len(state.ratios))
        if gone > 0:
            start = self.schedule.places(state.ratios[:gone])[-1]
            sink = tuple(tensor[..., : self.num_fixed, :] for tensor in state.memory)
            memory = join([sink, tuple(tensor[..., start:, :] for tensor in state.memory)])
            positions = state.positions[start - self.num_fixed :]
            state = dataclasses.replace(state, memory=memory, ratios=state.ratios[gone:], positions=positions)
        if first > state.first:
            self.state = dataclasses.replace(state, first=first)

    def _encode(self, last: int, wanted: list[int], advance: Callable[[int], object]) -> None:
        """Write the memories before `last` that are not there, in batches; they depend on no other."""
        state, length = self.state, self.schedule.segment
        if state.last >= last:
            return
        assert state.text is not None
        nothing = state.text[:, :0]
        end = state.text.shape[1] - (state.num_segments - last) * length
        texts = state.text[:, end - (last - state.last) * length : end].split(length, 1)
        there = len(state.ratios)
        ratios, places = wanted[there:], self.schedule.places(wanted)[there:-1]
        segments = [Segment(t, t, nothing, nothing, ratio) for t, ratio in zip(texts, ratios, strict=True)]
        memories = []
        for memory in self.compressor.write_all(segments, places):
            memories.append(memory)
            advance(length)
        self._add(memories, ratios, places[0])

    def _add(self, memories: list[Memory], ratios: list[int], place: int) -> None:
        """Keep new memories, whose slots stand in a row from `place` on; joining copies them, so that nothing larger
        is kept alive.
        """
        state = self.state
        new = place + torch.arange(sum(self.schedule.segment // ratio for ratio in ratios))
        memory, ratios_now = join([state.memory, *memories]), (*state.ratios, *ratios)
        positions = torch.cat([state.positions, new])
        state = dataclasses.replace(state, memory=memory, ratios=ratios_now, positions=positions)
        self.state = dataclasses.replace(state, text=self._needed(state))

    def _go_past(self, tokens: torch.Tensor) -> None:
        """Count segments, int64 [B, m l], and keep their text."""
        state, count = self.state, tokens.shape[1] // self.schedule.segment
        if not count:
            return
        sink, memory, text = state.sink, state.memory, tokens
        if sink is None or state.text is None:
            sink = tokens[:, : self.schedule.sink]
            memory = join([self.compressor.fixed(sink)])
        else:
            text = torch.cat([state.text, tokens], 1)
        state = dataclasses.replace(state, num_segments=state.num_segments + count, sink=sink, memory=memory, text=text)
        self.state = dataclasses.replace(state, text=self._needed(state))

    def _needed(self, state: TrailState) -> torch.Tensor:
        """Return the end of the text that may still be read or written."""
        assert state.text is not None
        first = max(state.last, self.schedule.first(state.num_segments))
        unwritten = 0 if self.compressor.recurrent else state.num_segments - first
        return _newest(state.text, max(self.schedule.overlap, unwritten * self.schedule.segment))

    def _segment(self, tokens: torch.Tensor) -> Segment:
        """Return the next segment; the first one has nothing before it and holds the sink itself."""
        before, sink, nothing = self.overlap, self.state.sink, tokens[:, :0]
        if before is None or sink is None:
            return Segment(tokens, tokens, nothing, nothing, self.ratio)
        return Segment(tokens, tokens, before, sink, self.ratio)


class Stream:
    """B texts that are read as they come, a token or many at a time: a trail of whole segments, a KV cache in the last.

    The tail grows to l tokens; the token after them has the trail go past them.

    Args:
        segment: l.
        read: tail [B, n] -> last hidden states [B, n, D], for a model that allows no cache; None to keep one.

    Attributes:
        num_computed: tokens that have gone through the model so far, those read again included.
    """

    num_computed = 0

    def __init__(self, trail: Trail, segment: int, read: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.trail, self.segment, self._read = trail, segment, read
        self.tail: torch.Tensor | None = None
        self._forget_cache()

    def _forget_cache(self) -> None:
        self._decoder: CachedDecoder | None = None
        self._logits: torch.Tensor | None = None
        self._num_read = 0  # tokens of the tail

    @torch.no_grad()
    def add(self, tokens: torch.Tensor, advance: Callable[[int], object] = lambda _: None) -> None:
        """Take tokens, int64 [B, n]; `advance` is told how many tokens the trail has just gone past."""
        if not tokens.shape[1]:
            return
        text = tokens if self.tail is None else torch.cat([self.tail, tokens], 1)
        whole = max(0, text.shape[1] - 1) // self.segment * self.segment
        if whole:
            state = self.trail.state
            try:
                self._go_past(text[:, :whole], advance)
            except BaseException:  # what was half done is undone, and the text can go on
                self.trail.state = state
                self._decoder = None if self.trail.holds_cache else self._decoder
                raise
            self.num_computed += whole
            self._forget_cache()
        self.tail = text[:, whole:]

    def _go_past(self, tokens: torch.Tensor, advance: Callable[[int], object]) -> None:
        for part in tokens.split(self.segment, 1):
            self.trail.write(part)
            advance(self.segment)

    @torch.no_grad()
    def next_logits(self) -> torch.Tensor:
        """Return the logits [B, V] of what follows (LongextError if they are not numbers).

        Tokens since the last call are read on top of what is cached.
        """
        assert self.tail is not None, "there is nothing to continue"
        unread, size = self.tail[:, self._num_read :], self.tail.shape[1]
        if self._logits is None or unread.shape[1]:
            self.num_computed += unread.shape[1] if self._decoder else size
            if self._read is not None:
                hidden = self._read(self.tail)
            elif self._decoder is None:
                self._decoder, hidden = self.trail.begin(self.tail, self.segment - size)
            else:
                hidden = self._decoder.feed(unread)
            self._logits = last_logits(self.trail.backbone, hidden, self._decoder.length if self._decoder else size)
            self._num_read = size
        return self._logits

    def mark(self) -> Any:
        """Return what `restore` takes to make the text again what it is now; what was read stays read."""
        if self.tail is not None:
            self.next_logits()
        length = self._decoder.length if self._decoder else 0
        return self.trail.state, self.tail, self._decoder, length, self._logits, self._num_read

    def restore(self, mark: Any) -> None:
        """Undo whatever came after `mark`."""
        self.trail.state, self.tail, self._decoder, length, self._logits, self._num_read = mark
        if self._decoder is not None and self.trail.holds_cache:
            self._decoder = None
        elif self._decoder is not None:
            self._decoder.truncate(length)

    @contextlib.contextmanager
    def rows(self, count: int) -> Iterator[None]:
        """Be `count` equal texts, that can go on in different ways; one again, as before, on leaving."""
        mark = self.mark()
        try:
            self.trail.spread(count)
            self.tail, self._logits = repeated(self.tail, count), repeated(self._logits, count)
            self._decoder = None
            yield
        finally:
            self.restore(mark)


def repeated(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Return one row [1, ...] as [count, ...]."""
    return None if tensor is None else tensor.expand(count, *tensor.shape[1:])


def _newest(tokens: torch.Tensor, size: int) -> torch.Tensor:
    return tokens[:, max(0, tokens.shape[1] - size) :]
