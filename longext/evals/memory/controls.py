"""What a memory is compared with: the same segments with other things in front, batched over places.

memory                  what the method under test keeps of the C tokens before the segment
no memory               the segment alone, by the same reader
wrong document          memories of another document's text, everything else as it is: what is left is not content
constant prefix         the slot-wise mean of the other documents' memories: the best constant without training
window (same KV)        as many raw tokens as the memory keeps positions readable (sink, slots, overlap), frozen model
window (all that fits)  as many raw tokens as fit the model's window, or all C, frozen model

Shape legend: R places, C tokens of context, l tokens of a segment, n = l - 1 scored tokens, B places at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor
from longext.compressor.memory import Memory
from longext.compressor.reading.readers import Reader
from longext.compressor.reading.trails import CompressorTrail
from longext.compressor.schedule import Ratio
from longext.errors import ConfigError
from longext.models.hf import score_hidden
from longext.models.protocol import TokenScores

MEMORY, NO_MEMORY, WRONG, CONSTANT = "memory", "no memory", "wrong document", "constant prefix"
SAME_KV, ALL_THAT_FITS = "window (same KV)", "window (all that fits)"
METHODS = (MEMORY, NO_MEMORY, WRONG, CONSTANT, SAME_KV, ALL_THAT_FITS)
FOREIGN = frozenset({WRONG, CONSTANT})  # need the text of another place
_TOKENS_AT_ONCE = 2_048
_TOKENS_AT_ONCE_ACCELERATOR = 32_768


@dataclass(frozen=True)
class Texts:
    """R places in documents, as tokens.

    Attributes:
        contexts: int64 [R, C], the text before each place, as much as the most context needs.
        segments: int64 [R, l], the segment after it.
        groups: which places share a document; in a single document each place is a group of its own.
        partners: for each place one of another group.
    """

    contexts: torch.Tensor
    segments: torch.Tensor
    groups: list[int]
    partners: list[int]


class Controls(ABC):
    """Scores the segments of `texts` with different things in front.

    Attributes of a class:
        methods: what `score` can do.
    """

    methods: tuple[str, ...] = METHODS

    def __init__(self, backbone: Backbone, texts: Texts) -> None:
        self.backbone = backbone
        self.contexts, self.segments = texts.contexts.to(backbone.device), texts.segments.to(backbone.device)
        self.groups, self.partners = texts.groups, texts.partners

    def score(self, method: str, length: int) -> TokenScores:
        """Score the last l - 1 tokens of every segment, [R, n], by `method` given `length` tokens of context."""
        if method == SAME_KV:
            return self._raw(length, self.num_readable(length))
        if method == ALL_THAT_FITS:
            return self._raw(length, self.backbone.window - self.segments.shape[1])
        if method == NO_MEMORY or not length:
            return self._alone()
        return self._remembered(method, length)

    @abstractmethod
    def num_readable(self, length: int) -> int:
        """Return how many positions before the segment the memory method keeps readable of `length` tokens."""

    @abstractmethod
    def _alone(self) -> TokenScores:
        """Score the segments by themselves."""

    @abstractmethod
    def _remembered(self, method: str, length: int) -> TokenScores:
        """Score with the memory of `length` tokens, or of other texts as `method` says."""

    def _raw(self, length: int, size: int) -> TokenScores:
        """Score with the last `size` raw tokens in front, by the frozen model, positions from 0."""
        size = min(size, length)
        parts = []
        for rows in self._batches(size):
            seen = torch.cat([self._context(rows, size), self.segments[rows, :-1]], 1)
            hidden = self.backbone.run(self.backbone.embed(seen))[:, size:]
            parts.append(score_hidden(self.backbone.model, hidden, self.segments[rows, 1:]))
        return _stack(parts)

    def _context(self, rows: slice | list[int], length: int) -> torch.Tensor:
        return self.contexts[rows, self.contexts.shape[1] - length :]

    def _batches(self, size: int) -> Iterator[slice]:
        """Yield places to run together when each has `size` positions in front of its segment."""
        is_cpu = self.backbone.device.type == "cpu"
        budget = _TOKENS_AT_ONCE if is_cpu else _TOKENS_AT_ONCE_ACCELERATOR
        count = max(1, budget // (size + self.segments.shape[1]))
        for start in range(0, len(self.segments), count):
            yield slice(start, start + count)


class ReaderControls(Controls):
    """Controls of a memory that needs no training."""

    methods = tuple(method for method in METHODS if method != CONSTANT)

    def __init__(self, reader: Reader, texts: Texts) -> None:
        super().__init__(Backbone(reader.plain.model), texts)
        self.reader = reader

    def num_readable(self, length: int) -> int:
        """Return the tokens that stay readable."""
        return self.reader.num_readable(length)

    def _alone(self) -> TokenScores:
        return self._raw(0, 0)

    def _remembered(self, method: str, length: int) -> TokenScores:
        parts = []
        for rows in self._batches(self.num_readable(length)):
            chosen = self.partners[rows] if method == WRONG else rows
            ids = torch.cat([self._context(chosen, length), self.segments[rows]], 1)
            parts.append(self.reader.score(ids, length + 1))
        return _stack(parts)


class CompressorControls(Controls):
    """Controls of a trained compressor.

    Memories that depend on no other are written once, for the longest context; a shorter one reads the newest of them,
    turned to the positions it has for them.
    """

    def __init__(self, compressor: Compressor, ratio: Ratio, texts: Texts) -> None:
        super().__init__(compressor.backbone, texts)
        self.compressor, self.ratio = compressor, ratio
        self.schedule = compressor.schedule(ratio, thins=compressor.nested)
        self._longest: Memory | None = None
        self._current: tuple[int, Memory] = (0, ())
        is_thinned = self.schedule.is_thinned(self.contexts.shape[1] // self.schedule.segment)
        turns = compressor.is_soft or _turns(compressor.backbone)
        self._is_shared = not compressor.recurrent and turns and not is_thinned

    def num_readable(self, length: int) -> int:
        """Return the positions of sink, memories and overlap."""
        return self.schedule.num_readable(length // self.schedule.segment)

    def _alone(self) -> TokenScores:
        return self._read(0, lambda _: ())

    def _remembered(self, method: str, length: int) -> TokenScores:
        memory = self._memory(length)
        if method == MEMORY:
            return self._read(length, lambda rows: _pick(memory, rows))
        if method == WRONG:
            return self._read(length, lambda rows: _pick(memory, self.partners[rows]))
        constants = {group: self._constant(memory, group) for group in set(self.groups)}
        return self._read(length, lambda rows: _cat([constants[group] for group in self.groups[rows]]))

    def _read(self, length: int, memory_of: Callable[[slice], Memory]) -> TokenScores:
        parts = []
        for rows in self._batches(self.num_readable(length)):
            trail = CompressorTrail(self.compressor, self.ratio, self._context(rows, length))
            hidden = trail.read_with(self.segments[rows, :-1], memory_of(rows))
            parts.append(score_hidden(self.backbone.model, hidden, self.segments[rows, 1:]))
        return _stack(parts)

    def _constant(self, memory: Memory, group: int) -> Memory:
        """Return the mean over the places of all other groups, [1, ...]: the best constant without training."""
        others = [row for row, other in enumerate(self.groups) if other != group]
        wide = [torch.promote_types(t.dtype, torch.float32) for t in memory]
        return tuple(
            t[others].mean(0, keepdim=True, dtype=kind).to(t.dtype) for t, kind in zip(memory, wide, strict=True)
        )

    def _memory(self, length: int) -> Memory:
        """Return the memories of all places, [R, ...], as the segment after `length` tokens reads them."""
        if self._current[0] != length:
            self._current = length, self._shortened(length) if self._is_shared else self._written(length)
        return self._current[1]

    def _shortened(self, length: int) -> Memory:
        """Return the newest memories of the longest context, as if the text began `length` tokens ago."""
        if self._longest is None:
            self._longest = self._written(self.contexts.shape[1])
        kept, all_of_them = self._num_slots(length), self._num_slots(self.contexts.shape[1])
        newest = tuple(t[..., t.shape[-2] - kept :, :] for t in self._longest) if kept else ()
        if self.compressor.is_soft:
            return newest
        return self.backbone.rerotate(newest, kept - all_of_them)

    def _num_slots(self, length: int) -> int:
        return self.schedule.num_slots(length // self.schedule.segment)

    def _written(self, length: int) -> Memory:
        parts = []
        for rows in self._batches(0):
            trail = CompressorTrail(self.compressor, self.ratio, thins=self.compressor.nested)
            for tokens in self._context(rows, length).split(self.compressor.spec.segment, 1):
                trail.write(tokens)
            parts.append(trail.memory())
        return _cat(parts)


def _turns(backbone: Backbone) -> bool:
    try:
        backbone.check_rotation()
    except ConfigError:
        return False
    return True


def _pick(memory: Memory, rows: slice | list[int]) -> Memory:
    return tuple(tensor[rows] for tensor in memory)


def _cat(memories: Sequence[Memory]) -> Memory:
    return tuple(torch.cat(tensors) for tensors in zip(*memories, strict=True))


def _stack(parts: Sequence[TokenScores]) -> TokenScores:
    return TokenScores(torch.cat([part.nll for part in parts]), torch.cat([part.is_top1 for part in parts]))
