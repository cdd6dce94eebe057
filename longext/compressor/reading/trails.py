"""What is kept of a text that is read segment by segment: raw tokens, a moving KV cache, or compressed memories.

Shape legend: B texts, l tokens of a segment, n tokens read, D hidden size, k slots of a segment's memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor, Segment
from longext.compressor.decoding import CachedDecoder, memory_decoder
from longext.compressor.memory import Memory, join
from longext.compressor.ratios import num_memories
from longext.compressor.rotation import check_rotation, rerotate


class Trail(ABC):
    """What B texts leave behind, in turns of `read` (score a segment) and `write` (go past it)."""

    @abstractmethod
    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [B, n, D] of the next segment or its beginning, int64 [B, n]; keep nothing."""

    @abstractmethod
    def begin(self, tokens: torch.Tensor, room: int) -> tuple[CachedDecoder, torch.Tensor]:
        """Return what `read` returns, and a decoder to which the segment's further tokens are fed, `room` at most."""

    @abstractmethod
    def write(self, tokens: torch.Tensor) -> None:
        """Go past a whole segment, int64 [B, l]; it may be one that has just been read."""


class WindowTrail(Trail):
    """The last `size` raw tokens, read again with every segment at positions from 0; nothing else is seen."""

    def __init__(self, backbone: Backbone, size: int) -> None:
        self.backbone, self.size = backbone, size
        self.past: torch.Tensor | None = None

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the frozen model over what is kept and the tokens."""
        seen = tokens if self.past is None else torch.cat([self.past, tokens], 1)
        return self.backbone.run(self.backbone.embed(seen))[:, -tokens.shape[1] :]

    def begin(self, tokens: torch.Tensor, room: int) -> tuple[CachedDecoder, torch.Tensor]:
        """Run the frozen model over what is kept and the tokens, with a cache."""
        seen = tokens if self.past is None else torch.cat([self.past, tokens], 1)
        decoder = CachedDecoder(self.backbone, room=room)
        return decoder, decoder.feed(seen)[:, -tokens.shape[1] :]

    def write(self, tokens: torch.Tensor) -> None:
        """Keep the newest tokens."""
        past = tokens if self.past is None else torch.cat([self.past, tokens], 1)
        self.past = past[:, max(0, past.shape[1] - self.size) :]


class CacheTrail(Trail):
    """Keys and values of the first `num_sinks` and the last `size` tokens, evicted after every segment.

    StreamingLLM (arXiv 2309.17453), where a segment of one token is the paper's eviction after every token; without
    sinks the segment recurrence of Transformer-XL (arXiv 1901.02860) with keys and values for its hidden states. A
    token's states are computed once, when it is read; what it saw then may have been evicted since. Positions are
    relative to the cache: kept keys are turned to 0, 1, ... from where they were computed, so each is rounded once.
    """

    def __init__(self, backbone: Backbone, num_sinks: int, size: int) -> None:
        self.backbone, self.num_sinks, self.size = backbone, num_sinks, size
        self.states: Memory = ()
        self.positions = torch.zeros(0, dtype=torch.int64)  # that the keys in `states` are rotated to
        self._read: tuple[torch.Tensor, Memory] | None = None

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the frozen model behind the cache."""
        decoder, hidden = self.begin(tokens, 0)
        self._read = tokens, decoder.states(len(self.positions))
        return hidden

    def begin(self, tokens: torch.Tensor, room: int) -> tuple[CachedDecoder, torch.Tensor]:
        """Run the frozen model behind the cache."""
        memory = rerotate(self.backbone, self.states, torch.arange(len(self.positions)) - self.positions)
        decoder = CachedDecoder(self.backbone, prefix=memory, room=tokens.shape[1] + room)
        return decoder, decoder.feed(tokens)

    def write(self, tokens: torch.Tensor) -> None:
        """Add the segment's states, then evict the tokens between the sinks and the newest."""
        if self._read is None or not torch.equal(self._read[0], tokens):
            self.read(tokens)
        assert self._read is not None
        kept = len(self.positions)
        states = join([self.states, self._read[1]])
        positions = torch.cat([self.positions, torch.arange(kept, kept + tokens.shape[1])])
        self._read = None
        total = len(positions)
        newest = torch.arange(max(min(self.num_sinks, total), total - self.size), total)
        stay = torch.cat([torch.arange(min(self.num_sinks, total)), newest])
        self.positions = positions[stay]
        self.states = states if len(stay) == total else tuple(t[..., stay.to(t.device), :] for t in states)


@dataclass(frozen=True)
class _Written:
    """A segment's memory and the position that its first slot was written for."""

    memory: Memory
    first_slot: int


class CompressorTrail(Trail):
    """Memories of the segments before, [sink | memories | overlap | segment]; the oldest leave when the window is full.

    A memory is written at the positions it is read at; keys that move because older memories have left are turned.
    Memories that depend on no other are written when they are first read, many at a time.

    Args:
        past: int64 [B, t l], tokens already gone past; recurrent memories of them are not written.
    """

    def __init__(self, compressor: Compressor, ratio: int, past: torch.Tensor | None = None) -> None:
        self.compressor, self.ratio = compressor, ratio
        self.capacity = num_memories(compressor, ratio)
        self.past = past
        self._made: dict[int, _Written] = {}
        self._fixed: Memory | None = None
        self._may_turn = False

    @property
    def num_written(self) -> int:
        """Segments gone past."""
        return 0 if self.past is None else self.past.shape[1] // self.compressor.spec.segment

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the reader over the memories and the segment."""
        return self.read_with(tokens, self.memory())

    def begin(self, tokens: torch.Tensor, room: int) -> tuple[CachedDecoder, torch.Tensor]:
        """Run the reader over memories, overlap and the tokens, with a cache."""
        segment = self._segment(tokens)
        memory = join([self._sink(), self.memory()])
        decoder = memory_decoder(self.compressor, segment.sink, memory, self.ratio, tokens.shape[1] + room)
        hidden = decoder.feed(torch.cat([segment.before, tokens], 1))
        return decoder, hidden[:, -tokens.shape[1] :]

    def read_with(self, tokens: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Return the last hidden states [B, n, D] with `memory` in the place of the text's own."""
        return self.compressor.read(self._segment(tokens), join([self._sink(), memory]))

    def write(self, tokens: torch.Tensor) -> None:
        """Go past a segment; recurrent architectures write its memory now."""
        t = self.num_written
        if self.compressor.recurrent:
            slot = self._slot(t - self._span(t)[0])
            made = self.compressor.write(self._segment(tokens), join([self._sink(), self.memory()]), slot)
            self._made[t] = _Written(made, slot)
        self.past = tokens if self.past is None else torch.cat([self.past, tokens], 1)
        self._made = {s: written for s, written in self._made.items() if s >= self._span(t + 1)[0]}

    def memory(self) -> Memory:
        """Return the memories that the next segment reads, at the positions it reads them at, without the sink."""
        first, last = self._span(self.num_written)
        if not self.compressor.recurrent:
            self._encode([s for s in range(first, last) if s not in self._made], first)
        written = [self._made[s] for s in range(first, last)]
        memory = join([one.memory for one in written])
        if self.compressor.is_soft:
            return memory
        count = self.compressor.slots(self.ratio)
        deltas = torch.tensor([self._slot(place) - one.first_slot for place, one in enumerate(written)])
        if bool(deltas.any()) and not self._may_turn:
            check_rotation(self.compressor.backbone)
            self._may_turn = True
        return rerotate(self.compressor.backbone, memory, deltas.repeat_interleave(count))

    def _span(self, t: int) -> tuple[int, int]:
        """Return the memories first .. last - 1 that segment t reads: the newest that fit."""
        last = min(t, self.compressor.spec.num_visible(t))
        return max(0, last - (1 if self.compressor.reads_last else self.capacity)), last

    def _slot(self, place: int) -> int:
        """Return the position of the first slot of the memory at `place` among those that are read."""
        return (0 if self.compressor.is_soft else self.compressor.spec.sink) + place * self.compressor.slots(self.ratio)

    def _encode(self, segments: list[int], first: int) -> None:
        """Write memories of independent segments in batches."""
        if not segments:
            return
        assert self.past is not None
        length = self.compressor.spec.segment
        texts = self.past.split(length, 1)
        nothing = self.past[:, :0]
        slots = [self._slot(s - first) for s in segments]
        inputs = [Segment(texts[s], texts[s], nothing, nothing, self.ratio) for s in segments]
        made = self.compressor.write_all(inputs, slots)
        self._made |= {s: _Written(m, slot) for s, m, slot in zip(segments, made, slots, strict=True)}

    def _segment(self, tokens: torch.Tensor) -> Segment:
        """Return the next segment; the first one has nothing before it and holds the sink itself."""
        past = tokens[:, :0] if self.past is None else self.past
        spec = self.compressor.spec
        before = past[:, max(0, past.shape[1] - spec.overlap) :]
        return Segment(tokens, tokens, before, past[:, : spec.sink], self.ratio)

    def _sink(self) -> Memory:
        """Return the sink's keys and values, () for the first segment and for soft memories."""
        if not self.num_written:
            return ()
        if self._fixed is None:
            assert self.past is not None
            self._fixed = self.compressor.fixed(self.past[:, : self.compressor.spec.sink])
        return self._fixed
