"""What every compressor is: one `step` that reads memories, scores a segment and writes its memory.

Shape legend: B documents, l tokens of a segment, k = l / ratio slots, M slots visible to a segment, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from longext.compressor.adapters import Adapters
from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.memory import Memory
from longext.compressor.schedule import Ratio, Schedule
from longext.compressor.segments import REPEAT, Segment
from longext.compressor.spec import CompressorSpec, check_fading, check_ratio, check_spec
from longext.models.turns import eos_of
from longext.training.losses import IGNORED

_ENCODED_AT_ONCE = {"cpu": 2_048}  # tokens of one encoder pass: more only take memory there
_ENCODED_AT_ONCE_ACCELERATOR = 16_384


class Compressor(nn.Module):
    """Trainable parts around a frozen model. Only they are its parameters: the model is not part of its state.

    Attributes of a class:
        reference: for tables and cards; the summary is the first line of the module.
        recurrent: a memory depends on the memories before it.
        appends: slots that are written take positions behind the segment.
        reads_last: only the previous segment's memory is read.
        trains_reader: the scoring pass has trained parameters of its own.
        memories: the kinds of memory it can make.
        reader: adapter set of the scoring pass; None for the frozen model.
        nested: a memory of a higher ratio is a subset of that of a lower one, so ratios it was not trained on work too.

    Args:
        backbone: the frozen model.
        spec: sizes.
    """

    reference = ""
    recurrent = False
    appends = False
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
        """True if memories are vectors, which the decoder reads as if they were embeddings."""
        return self.spec.memory == "soft"

    @property
    def summary(self) -> str:
        """One line on the architecture, for tables and cards."""
        return COMPRESSORS.summary(self.spec.arch)

    def slots(self, ratio: int) -> int:
        """Return the slots that a segment's memory has."""
        return self.spec.segment // ratio

    def find_ratio(self, ratio: int | Sequence[int] | None) -> Ratio:
        """Return the ratio to compress at, or several by distance: `ratio`, or the first of training if None.

        Raises:
            ConfigError: as `check_ratio` and `check_fading`.
        """
        given = self.spec.ratios[:1] if ratio is None else ratio
        chosen = (given,) if isinstance(given, int) else tuple(given)
        if len(chosen) > 1:
            check_fading(self.spec, chosen, self.backbone.window)
            return chosen
        check_ratio(self.spec, chosen[0], self.backbone.window)
        return chosen[0]

    def schedule(self, ratio: Ratio, *, parts: int | None = None, thins: bool = False) -> Schedule:
        """Return what segments read at one ratio, or several by distance, in the model's window; as `Schedule.of`."""
        return Schedule.of(type(self), self.spec, ratio, self.backbone.window, parts=parts, thins=thins)

    def initial_vectors(self, count: int) -> torch.Tensor:
        """Return `count` copies of the EOS embedding [count, D] to start from (float32 at least)."""
        table = self.backbone.embedding.weight
        row = next(iter(eos_of(self.backbone.config)), 0)
        vector: torch.Tensor = table[row].detach()
        return vector.to(torch.promote_types(vector.dtype, torch.float32)).repeat(count, 1).clone()

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return embeddings [B, n, D]; REPEAT becomes the trained vector."""
        # REPEAT is below 0 and has no row in the table: any row does, since the next lines replace it
        embedded: torch.Tensor = self.backbone.embed(tokens.clamp(min=0))
        is_repeat = tokens == REPEAT
        if bool(is_repeat.any()):
            embedded = torch.where(is_repeat[..., None], self.repeat.to(embedded.dtype), embedded)
        return embedded

    def rows(self, vectors: torch.Tensor, batch: int) -> torch.Tensor:
        """Return trained vectors [k, D] as input rows [B, k, D]."""
        return vectors.to(self.backbone.dtype).expand(batch, -1, -1)

    def fixed(self, sink: torch.Tensor) -> Memory:
        """Return keys and values of the sink tokens [B, s] as the frozen model makes them, or () if there are none.

        Architectures of soft memory read the sink as rows instead.
        """
        if self.is_soft or not sink.shape[1]:
            return ()
        with torch.no_grad():
            captured = self.backbone.attention_inputs(self.embed(sink), slice(None))
            return self.backbone.project(captured, torch.arange(sink.shape[1], device=sink.device)[None])

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
        """Return the input rows [B, n, D] in front of the raw tokens if memory is soft.

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
        of_labels, of_teacher = segment.weights
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if of_labels:
            total = total + of_labels * self.backbone.loss(hidden, segment.labels, segment.label_weights)
        if of_teacher and segment.teacher is not None:
            scored = segment.labels != IGNORED
            total = total + of_teacher * self.backbone.divergence(hidden, segment.teacher, scored)
        return total


class JointCompressor(Compressor):
    """Reads and writes in one forward pass; what is written changes nothing of what is read."""

    def run(self, segment: Segment, memory: Memory, first_slot: int) -> tuple[torch.Tensor, Memory]:
        """Return (last hidden states [B, l, D] of the segment, its memory)."""
        raise NotImplementedError

    def step(
        self, segment: Segment, memory: Memory, first_slot: int, *, loss: bool, write: bool
    ) -> tuple[torch.Tensor | None, Memory | None]:
        """Read and write at once."""
        if not write:
            return super().step(segment, memory, first_slot, loss=loss, write=False)
        hidden, written = self.run(segment, memory, first_slot)
        return self.loss(hidden, segment) if loss else None, written

    def write(self, segment: Segment, memory: Memory, first_slot: int) -> Memory:
        """Write without scoring."""
        return self.run(segment, memory, first_slot)[1]


class RecurrentCompressor(JointCompressor):
    """One adapted model reads memory vectors in front of a segment and writes vectors behind it.

    Attributes:
        vectors: trained inputs [k, D] of the slots, as many as the smallest ratio makes.
    """

    recurrent = appends = trains_reader = True
    memories = ("soft",)
    reader = "model"

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        self.vectors = nn.Parameter(self.initial_vectors(self.slots(min(spec.ratios))))
        self.adapters.add("model", "qkvo")

    def run_with(self, segment: Segment, memory: Memory, rows: torch.Tensor) -> tuple[torch.Tensor, Memory]:
        """Return what `run` does if the last hidden states of `rows` [B, k, D], behind the segment, are its memory."""
        tokens = self.embed(torch.cat([segment.before, segment.tokens], 1))
        prefix = self.prefix_rows(segment.sink, memory, segment.ratio)
        with self.reading():
            hidden = self.backbone.run(torch.cat([prefix, tokens, rows], 1))
        end = hidden.shape[1] - rows.shape[1]
        return hidden[:, end - segment.tokens.shape[1] : end], (hidden[:, end:],)


def build_compressor(backbone: Backbone, spec: CompressorSpec) -> Compressor:
    """Return a new compressor of `spec.arch` on `backbone` (ConfigError as `check_spec`)."""
    check_spec(spec, backbone.window)
    backbone.hold_rotation()
    backbone.check_masks()
    return COMPRESSORS[spec.arch](backbone, spec)
