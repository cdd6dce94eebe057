"""One document read through memory: tokens come in, full segments are compressed, the rest is read raw.

Shape legend: l tokens of a segment, k = l / ratio slots, M slots in memory, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longext.compressor.base import Compressor
from longext.compressor.checkpoint import LoadedCompressor
from longext.compressor.memory import Memory, num_bytes, num_slots
from longext.compressor.reading.continuing import Continued
from longext.compressor.reading.memory_file import (
    TOKENS,
    Origin,
    Stored,
    check_held,
    check_memory,
    check_model,
    damaged,
    hash_weights,
    memory_of,
    read_memory,
    write_memory,
)
from longext.compressor.reading.trails import CompressorTrail, Stream, TrailState
from longext.compressor.schedule import WHEN_FULL, Ratio, spelled
from longext.compressor.spec import CompressorSpec
from longext.errors import CheckpointError, ConfigError
from longext.models.turns import ending_tokens, named_ends

UNTRAINED = "thinned"  # a memory of raw keys: a compressor of which nothing was trained
_PARTS = 4  # memories that leave do so one in so many at once: keys seldom move


class Session(Stream, Continued):
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
        origin: what wrote it, needed to save.
        ends: tokens that end what is generated (default: those that the model itself names).

    Raises:
        ConfigError: a ratio or `when_full` that cannot be.
    """

    trail: CompressorTrail
    takes_repeat = True

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: Ratio | None = None,
        when_full: str | None = None,
        origin: Origin | None = None,
        ends: Collection[int] | None = None,
    ) -> None:
        self.compressor = compressor
        self.ratio = compressor.find_ratio(ratio)
        self.when_full = check_when_full(compressor, when_full)
        self.origin = origin
        self.eos = named_ends(compressor.backbone.model) if ends is None else frozenset(ends)
        self.reset()

    @classmethod
    def of(cls, loaded: LoadedCompressor, *, ratio: Ratio | None = None, when_full: str | None = None) -> Session:
        """Return an empty session of a compressor from disk."""
        ends = ending_tokens(loaded.compressor.backbone.model, loaded.tokenizer)
        base = loaded.base
        directory, segment = str(loaded.directory.absolute()), loaded.compressor.spec.segment
        origin = Origin(directory, base.name, base.revision, base.weights, segment)
        return cls(loaded.compressor, ratio=ratio, when_full=when_full, origin=origin, ends=ends)

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

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return self.compressor.backbone.device

    @property
    def num_ids(self) -> int:
        """How many token ids the model knows."""
        return int(self.compressor.backbone.embedding.weight.shape[0])

    def refusal(self, num_tokens: int) -> str:
        """Return what to say where there is no room."""
        rest = "thin" if self.compressor.nested else "forget"
        return (
            f"At ratio {spelled(self.ratio)} the model's {self.compressor.backbone.window:,} positions hold "
            f"documents of at most {self.limit:,} tokens: raise the ratio, extend the model, or let memories make "
            f"room (--when-full {rest})."
        )

    def facts(self) -> dict[str, Any]:
        """Return slots, bytes, tokens forgotten and thinned, and the ratio asked for."""
        names = ("num_slots", "num_bytes", "num_forgotten", "num_thinned")
        ratio = self.ratio if isinstance(self.ratio, int) else spelled(self.ratio)
        return {**{name: getattr(self, name) for name in names}, "ratio": ratio}

    def positions(self) -> tuple[int, int]:
        """Return the positions in use: the sink, slots, and raw tokens; and how many the model has."""
        read = self.trail.schedule.num_readable(self.trail.state.num_segments)
        raw = 0 if self.tail is None else self.tail.shape[1]
        return read + raw, self.compressor.backbone.window

    def reset(self) -> None:
        """Forget everything and start a new document."""
        trail = CompressorTrail(self.compressor, self.ratio, parts=_PARTS, thins=self.when_full == "thin")
        super().__init__(trail, self.spec.segment)
        self.num_tokens = 0

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

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write the session to one .safetensors file, from which `load` goes on; `notes` as in `write_memory`."""
        assert self.origin, "a session that is saved must know its model: use Session.of"
        state = self.trail.state
        description = {
            "kind": "compressor",
            "spec": self.spec.to_json(),
            "ratios": list(self.trail.schedule.ratios),
            "when_full": self.when_full,
            "first": state.first,
            "held": list(state.ratios),
            "compressor": self._hash(),
            "num_segments": state.num_segments,
            "num_tokens": self.num_tokens,
        }
        tokens = {"sink": state.sink, "before": self.trail.overlap, "tail": self.tail}
        lists = {name: [] if ids is None else ids[0].tolist() for name, ids in tokens.items()}
        tensors = {f"memory.{i}": tensor for i, tensor in enumerate(state.memory)}
        write_memory(Path(path), tensors, lists, description, self.origin, notes)

    def _hash(self) -> str:
        """Return the hash of the compressor's weights, "" if nothing was trained of it."""
        return "" if self.origin and self.origin.memory.startswith(f"{UNTRAINED}:") else hash_weights(self.compressor)

    @classmethod
    def load(cls, path: str | Path, loaded: LoadedCompressor) -> Session:
        """Return the session that `save` wrote.

        Raises:
            CheckpointError: not a memory file, or one that another compressor or another base model wrote.
        """
        stored = read_memory(Path(path))
        check_model(stored.path, loaded.base, stored.origin.weights)
        session = cls.of(loaded)
        session.restore_from(stored)
        return session

    def restore_from(self, stored: Stored) -> None:
        """Go on from a file.

        Raises:
            CheckpointError: another compressor wrote it, or it is damaged.
        """
        path, said, compressor = stored.path, stored.description, self.compressor
        if said["kind"] != "compressor":
            raise CheckpointError(f"{path} was written with --memory {said['memory']}, not by a compressor.")
        spec = CompressorSpec.from_json(said["spec"])
        if spec.overlap != self.spec.overlap and replace(spec, overlap=self.spec.overlap) == self.spec:
            raise CheckpointError(
                f"{path} was written with {spec.overlap} raw tokens beside the memories, and this compressor keeps "
                f"{self.spec.overlap}: open it by its name (--memory {path})."
            )
        if spec != self.spec or said["compressor"] != self._hash():
            raise CheckpointError(
                f"{path} was written by another compressor ({spec.arch}, segments of {spec.segment}) than this one "
                f"({self.spec.arch}, segments of {self.spec.segment}), or before it was trained further: only the one "
                "that wrote a memory can read it."
            )
        self.ratio = compressor.find_ratio(tuple(said["ratios"]))
        self.when_full = check_when_full(compressor, said["when_full"])
        self.reset()
        schedule, first, held = self.trail.schedule, said["first"], tuple(said["held"])
        count, memory = said["num_segments"], memory_of(stored)
        check_held(path, held, first, count, spec.segment)
        end = schedule.places(held)[-1]
        check_memory(path, memory, compressor, end if count else 0)
        sink, before, tail = (self.checked(stored.tokens[name]) for name in TOKENS)
        past = count * spec.segment
        sizes = (spec.sink if count else 0, min(spec.overlap, past), said["num_tokens"] - past)
        if sizes != (sink.shape[1], before.shape[1], tail.shape[1]) or tail.shape[1] > spec.segment:
            raise damaged(path, "its tokens are not as many as it says")
        if count:
            backbone = compressor.backbone
            memory = tuple(tensor.to(backbone.device, backbone.dtype) for tensor in memory)
            positions = torch.arange(schedule.fixed, end)
            self.trail.state = TrailState(count, sink, before, memory, first, held, positions)
        self.tail = tail if tail.shape[1] else None
        self.num_tokens = said["num_tokens"]


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
