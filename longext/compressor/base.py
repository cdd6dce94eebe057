"""What every compressor is: one `step` that reads memories, scores a segment and writes its memory.

Shape legend: B documents, l tokens of a segment, k = l / ratio slots, M slots visible to a segment, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from longext.compressor.adapters import Adapters
from longext.compressor.backbone import Backbone
from longext.compressor.memory import Memory
from longext.errors import CheckpointError, ConfigError
from longext.registry import Registry
from longext.training.losses import IGNORED
from longext.untrusted import build

_ENCODED_AT_ONCE = {"cpu": 2_048}  # tokens of one encoder pass: more only take memory there
_ENCODED_AT_ONCE_ACCELERATOR = 16_384
REPEAT = -1  # the token id that stands for the trained "repeat the text" vector (auto-encoding)


@dataclass(frozen=True, kw_only=True)
class CompressorSpec:
    """What a trained compressor is, as compressor.json keeps it.

    Attributes:
        arch: a name in `COMPRESSORS`.
        segment: l, tokens of a segment.
        ratios: the compression ratios it was trained on; the first is the default.
        sink: raw tokens of the document's start that stay readable (keys and values; 0 for none).
        overlap: raw tokens before a segment that stay readable beside the memories.
        memory: "kv" or "soft".
        rank, alpha: of its adapters.
    """

    arch: str = "uio"
    segment: int = 1024
    ratios: tuple[int, ...] = (8,)
    sink: int = 1
    overlap: int = 0
    memory: str = "kv"
    rank: int = 128
    alpha: float = 512.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "ratios": list(self.ratios)}

    @classmethod
    def from_json(cls, values: Any, where: str = "The compressor's spec") -> CompressorSpec:
        """Return the spec that `to_json` wrote; `where` is its place as an error names it.

        Raises:
            CheckpointError: an unknown or missing key, a value of another type, or a count that cannot be.
        """
        spec: CompressorSpec = build(cls, values, where, CheckpointError, "Restore the file.")
        counts = (spec.segment, spec.rank, *spec.ratios, spec.sink + 1, spec.overlap + 1)
        if not spec.ratios or not all(1 <= count <= 2**31 for count in counts):
            raise CheckpointError(f"{where} has counts that no compressor has ({counts}). Restore the file.")
        return spec

    @property
    def first_reader(self) -> int:
        """The number of the first segment that reads a memory."""
        return 1 + self.overlap // self.segment

    @property
    def shortest(self) -> int:
        """Tokens of the shortest document with a token whose prediction reads a memory."""
        return self.first_reader * self.segment + 2

    def num_visible(self, segment: int) -> int:
        """Return how many memories segment number `segment` reads: those not wholly inside the overlap."""
        return max(0, segment + 1 - self.first_reader)

    def max_segments(self, window: int, ratio: int) -> int:
        """Return the most segments of a document whose last one still fits: sink + (T - 1) k + overlap + l <= window.

        0 where not even one does.
        """
        room = window - self.sink - self.segment - self.overlap
        if room < 0:
            return 0
        return room // (self.segment // ratio) + self.first_reader


@dataclass
class Segment:
    """One segment of B documents.

    Attributes:
        tokens: int64 [B, l].
        labels: int64 [B, l], aligned (label p belongs to the output at p), -100 where nothing is scored.
        before: int64 [B, o], the raw tokens that stay readable before it.
        sink: int64 [B, s], the first tokens of the documents; empty for segment 0, which holds them itself.
        ratio: of the memory it writes.
        teacher: last hidden states [B, l, D] to imitate, or None.
        weights: of cross-entropy and of the divergence from the teacher.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    before: torch.Tensor
    sink: torch.Tensor
    ratio: int
    teacher: torch.Tensor | None = None
    weights: tuple[float, float] = field(default=(1.0, 0.0))


class Compressor(nn.Module):
    """Trainable parts around a frozen model. Only they are its parameters: the model is not part of its state.

    Attributes of a class:
        summary, reference: for tables and cards.
        recurrent: a memory depends on the memories before it.
        joint: reading and writing share one forward pass.
        reads_last: only the previous segment's memory is read.
        trains_reader: the scoring pass has trained parameters of its own.
        memories: the kinds of memory it can make.
        reader: adapter set of the scoring pass; None for the frozen model.
        nested: a memory of a higher ratio is a subset of that of a lower one, so ratios it was not trained on work too.

    Args:
        backbone: the frozen model.
        spec: sizes.
    """

    summary = ""
    reference = ""
    recurrent = False
    joint = False
    reads_last = False
    trains_reader = False
    memories: tuple[str, ...] = ("kv",)
    reader: str | None = None
    nested = False

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__()
        self._backbone = (backbone,)  # a tuple hides it from nn.Module: the frozen model is not ours to save
        self.spec = spec
        self.adapters = Adapters(backbone.attentions, spec.rank, spec.alpha)
        self.repeat = nn.Parameter(self.initial_vectors(1)[0])

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self._backbone[0]

    @property
    def is_soft(self) -> bool:
        """True where memories are vectors, which the decoder reads as if they were embeddings."""
        return self.spec.memory == "soft"

    def slots(self, ratio: int) -> int:
        """Return the slots that a segment's memory has."""
        return self.spec.segment // ratio

    def initial_vectors(self, count: int) -> torch.Tensor:
        """Return `count` copies of the EOS embedding [count, D] to start from (float32 at least)."""
        table = self.backbone.embedding.weight
        eos = self.backbone.config.eos_token_id
        row = eos[0] if isinstance(eos, (list, tuple)) else eos
        vector: torch.Tensor = table[int(row if row is not None else 0)].detach()
        return vector.to(torch.promote_types(vector.dtype, torch.float32)).repeat(count, 1).clone()

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return embeddings [B, n, D]; REPEAT becomes the trained vector."""
        embedded: torch.Tensor = self.backbone.embed(tokens.clamp(min=0))
        is_repeat = tokens == REPEAT
        if bool(is_repeat.any()):
            embedded = torch.where(is_repeat[..., None], self.repeat.to(embedded.dtype), embedded)
        return embedded

    def rows(self, vectors: torch.Tensor, batch: int) -> torch.Tensor:
        """Return trained vectors [k, D] as input rows [B, k, D]."""
        return vectors.to(self.backbone.dtype).expand(batch, -1, -1)

    def fixed(self, sink: torch.Tensor) -> Memory:
        """Return keys and values of the sink tokens [B, s] as the frozen model makes them, or () where there are none.

        Architectures of soft memory read the sink as rows instead.
        """
        if self.is_soft or not sink.shape[1]:
            return ()
        with torch.no_grad():
            captured = self.backbone.attention_inputs(self.embed(sink), slice(None))
            return self.backbone.project(captured, torch.arange(sink.shape[1], device=sink.device)[None])

    @classmethod
    def max_segments(cls, spec: CompressorSpec, window: int, ratio: int) -> int:
        """Return the most segments of a document that fit `window` positions at this ratio."""
        return spec.max_segments(window, ratio)

    @classmethod
    def max_memories(cls, spec: CompressorSpec, window: int, ratio: int) -> int:
        """Return the most memories that one segment can read in `window` positions at this ratio."""
        return max(0, cls.max_segments(spec, window, ratio) - spec.first_reader)

    # --- what an architecture defines -------------------------------------------------------------------------------

    def step(
        self, segment: Segment, memory: Memory, first_slot: int, *, loss: bool, write: bool
    ) -> tuple[torch.Tensor | None, Memory | None]:
        """Score a segment given memories, and write its own.

        Args:
            memory: what it reads: for `kv` fixed slots and memories, for `soft` memories alone.
            first_slot: position of the first slot that it writes.
            loss, write: which of the two is wanted.

        Returns:
            (summed loss, a scalar, or None; memory or None).
        """
        scored = self.loss(self.read(segment, memory), segment) if loss else None
        return scored, self.write(segment, memory, first_slot) if write else None

    def read(self, segment: Segment, memory: Memory) -> torch.Tensor:
        """Return the last hidden states [B, l, D] of the segment given memories."""
        embeds = self.embed(torch.cat([segment.before, segment.tokens], 1))
        if self.is_soft:
            embeds = torch.cat([self.prefix_rows(segment.sink, memory, segment.ratio), embeds], 1)
            memory = ()
        with self.reading():
            return self.backbone.run(embeds, prefix=memory)[:, -segment.tokens.shape[1] :]

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Return the context that the scoring pass runs in: the reader's adapters and no others."""
        return self.adapters.use(self.reader)

    def prefix_rows(self, sink: torch.Tensor, memory: Memory, ratio: int) -> torch.Tensor:
        """Return the input rows [B, n, D] that stand before the raw tokens where memory is soft.

        Args:
            sink: int64 [B, s].
            memory: vectors [B, M, D].
            ratio: of the segment that is read.
        """
        return torch.cat([self.embed(sink), *memory], 1)

    def write(self, segment: Segment, memory: Memory, first_slot: int) -> Memory:
        """Return the segment's memory."""
        raise NotImplementedError

    def write_batch(self, segments: Sequence[Segment], first_slots: Sequence[int]) -> list[Memory]:
        """Return the memories of several segments that depend on no other (not for recurrent architectures)."""
        return [self.write(segment, (), slot) for segment, slot in zip(segments, first_slots, strict=True)]

    def write_all(
        self, segments: Sequence[Segment], first_slots: Sequence[int], at_once: int | None = None
    ) -> Iterator[Memory]:
        """Yield what `write_batch` makes, in order, a few segments in a pass.

        Args:
            at_once: segments of a pass; None for as many as fill the device.
        """
        if not segments:
            return
        tokens = segments[0].tokens
        budget = _ENCODED_AT_ONCE.get(tokens.device.type, _ENCODED_AT_ONCE_ACCELERATOR)
        size = at_once or max(1, budget // tokens.numel())
        for start in range(0, len(segments), size):
            yield from self.write_batch(segments[start : start + size], first_slots[start : start + size])

    def loss(self, hidden: torch.Tensor, segment: Segment) -> torch.Tensor:
        """Return the weighted sum of cross-entropy and, with a teacher, the divergence from it."""
        from longext.compressor.distillation import divergence

        of_labels, of_teacher = segment.weights
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if of_labels:
            total = total + of_labels * self.backbone.loss(hidden, segment.labels)
        if of_teacher and segment.teacher is not None:
            total = total + of_teacher * divergence(self.backbone, hidden, segment.teacher, segment.labels != IGNORED)
        return total


COMPRESSORS: Registry[type[Compressor]] = Registry("architecture")


def check_spec(spec: CompressorSpec, window: int) -> None:
    """Raise ConfigError for an unknown architecture, a ratio that does not divide it, too small a window."""
    cls = COMPRESSORS[spec.arch]
    if spec.memory not in cls.memories:
        raise ConfigError(f"--memory-kind of {spec.arch} must be {' or '.join(cls.memories)}, got '{spec.memory}'.")
    for ratio in spec.ratios:
        if ratio < 1 or spec.segment % ratio:
            divisors = [n for n in (2, 4, 8, 16, 32, 64) if spec.segment % n == 0]
            raise ConfigError(
                f"--ratio {ratio} does not divide --segment {spec.segment}: choose of "
                f"{', '.join(map(str, divisors)) or 'its divisors'}."
            )
    if len(spec.ratios) != len(set(spec.ratios)) or not spec.ratios:
        raise ConfigError(f"--ratio must be different whole numbers, got {','.join(map(str, spec.ratios))}.")
    if spec.sink and cls.trains_reader and spec.memory == "kv":
        raise ConfigError(f"{spec.arch} trains its reader, so sink tokens have no fixed keys: use --sink 0.")
    if cls.reads_last and len(spec.ratios) > 1:
        raise ConfigError(f"{spec.arch} hands one memory of fixed size on: give one --ratio.")
    if spec.sink >= spec.segment:
        raise ConfigError(
            f"--sink {spec.sink} must be below --segment {spec.segment}: the first segment holds the sink tokens."
        )
    if not cls.max_memories(spec, window, max(spec.ratios)):
        raise ConfigError(
            f"--segment {spec.segment} with --sink {spec.sink} and --overlap {spec.overlap} leaves no room for "
            f"memories in the model's {window} positions: choose a shorter --segment, or extend the model first "
            "(longext extend)."
        )


def build_compressor(backbone: Backbone, spec: CompressorSpec) -> Compressor:
    """Return a new compressor of `spec.arch` on `backbone` (ConfigError as `check_spec`)."""
    import longext.compressor.architectures  # noqa: F401

    check_spec(spec, backbone.window)
    backbone.hold_rotation()
    return COMPRESSORS[spec.arch](backbone, spec)
