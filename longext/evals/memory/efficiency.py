"""Time and memory of a growing context: full attention, a window of raw tokens, a compressor at each ratio.

Every way has to end in the same place: logits of the next token, and a cache from which decoding goes on. Batch 1.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor
from longext.compressor.checkpoint import is_compressor
from longext.compressor.gradients import Sweep
from longext.compressor.memory import MemoryStore
from longext.compressor.reading.decoder import CachedDecoder, memory_decoder
from longext.compressor.schedule import Schedule
from longext.compressor.segments import split_segments
from longext.errors import ConfigError
from longext.evals.base import Outcome, Work
from longext.evals.memory.reconstruction import describe_compressor, open_compressor, read_spec
from longext.manifest import result_record
from longext.models.batching import kv_numbers
from longext.models.hf import load_language_model
from longext.planning.tracker import MemoryTracker

if TYPE_CHECKING:
    from longext.evals.suites.efficiency import Efficiency

_DEFINITION = (
    "random tokens, batch 1. Prefill: until the logits of the next token are there and decoding can go on; full: one "
    "forward pass with a KV cache, head at the last position only; window: the same on the last tokens alone; "
    "compressor: all whole segments but the last encoded (in batches where memories are independent), then the raw "
    "rest read behind the memories. Decoding: greedy, cache written in place, the re-compression of a full segment "
    "not included. Interleaved runs, the best of each; seconds on one CPU thread are the process's CPU time, else wall "
    "time"
)
_MEMORY = {
    "cuda": "most bytes allocated above model and input (torch.cuda.max_memory_allocated), prefill and decoding",
    "cpu": "most bytes of live tensors above model and input, counted operator by operator in an untimed run (a "
    "process's peak resident memory never falls, so it cannot tell one point from the next)",
}


@dataclass(frozen=True)
class Way:
    """One way of holding a context.

    Attributes:
        name: "full", "window" or the architecture.
        ratio: of a compressor, else None.
        prefill: (tokens int64 [1, N], room) -> (decoder after all of them, logits [1, V] of the next token).
        slots: N -> positions that stay in the cache, by the closed form.
        bytes_per_token: the closed form of what one more token of context costs in the long run.
    """

    name: str
    ratio: int | None
    prefill: Callable[[torch.Tensor, int], tuple[CachedDecoder, torch.Tensor]]
    slots: Callable[[int], int]
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class EfficiencyPoint:
    """One way at one length, measured.

    Attributes:
        prefill_seconds: the best run; `prefill_tokens_per_second` and `prefill_microseconds` (per token) follow.
        decode_tokens_per_second: over `num_new_tokens` tokens behind that context; the best run.
        slots: positions in the cache after the prefill.
        kv_bytes: keys and values held after the prefill, from the tensors; `kv_bytes_per_token` of context.
        kv_bytes_formula: 2 x layers x KV heads x head size x bytes x slots.
        marginal_bytes_formula: bytes that one more token of context costs: those of a position, / ratio.
        peak_bytes: the most memory above model and input.
    """

    way: str
    ratio: int | None
    length: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    prefill_microseconds: float
    decode_tokens_per_second: float
    slots: int
    kv_bytes: int
    kv_bytes_per_token: float
    kv_bytes_formula: int
    marginal_bytes_formula: float
    peak_bytes: int


# --- what is compared -------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A frozen model, the compressor trained on it or None, and what a record says of them."""

    backbone: Backbone
    compressor: Compressor | None
    description: dict[str, Any]


def ratios_of(config: Efficiency) -> tuple[int, ...]:
    """Return the ratios to measure: those of --ratio or of training; none of a plain model.

    Raises:
        ConfigError: a ratio that cannot be, options of a compressor for a plain model, or too short lengths.
    """
    if not is_compressor(config.model):
        if config.ratio or config.base:
            raise ConfigError("--ratio and --base are for the directory of a trained compressor.")
        return ()
    spec, ratios = read_spec(config)
    if min(config.lengths) <= spec.segment:
        raise ConfigError(
            f"--lengths must be above the segment's {spec.segment} tokens, of which nothing is compressed; got "
            f"{min(config.lengths)}."
        )
    return ratios


def open_subject(config: Efficiency) -> Subject:
    """Return the model or compressor that `config.model` names."""
    if not is_compressor(config.model):
        model = load_language_model(config)
        return Subject(Backbone(model.model), None, model.describe())
    loaded = open_compressor(config)
    return Subject(loaded.compressor.backbone, loaded.compressor, describe_compressor(loaded))


def ways_of(backbone: Backbone, compressor: Compressor | None, ratios: Sequence[int], window: int) -> list[Way]:
    """Return full attention, the window of raw tokens, and the compressor at each ratio."""
    token = bytes_per_position(backbone)
    ways = [
        Way("full", None, functools.partial(_prefill_raw, backbone, None), lambda length: length, token),
        Way("window", None, functools.partial(_prefill_raw, backbone, window), lambda n: min(n, window), 0.0),
    ]
    for ratio in ratios if compressor is not None else ():
        assert compressor is not None
        ways.append(
            Way(
                compressor.spec.arch,
                ratio,
                functools.partial(_prefill_compressed, compressor, ratio),
                functools.partial(_compressed_slots, compressor, ratio),
                0.0 if compressor.reads_last else token / ratio,
            )
        )
    return ways


def bytes_per_position(backbone: Backbone) -> int:
    """Return the bytes of keys and values of one position: 2 x layers x KV heads x head size x bytes of a number."""
    return int(kv_numbers(backbone.config) * backbone.dtype.itemsize)


def _compressed_slots(compressor: Compressor, ratio: int, length: int) -> int:
    """Return sink + slots + overlap + raw tokens after `length` tokens."""
    schedule = Schedule.of(type(compressor), compressor.spec, ratio)
    last = (length - 1) // schedule.segment
    return schedule.num_readable(last) + length - last * schedule.segment


@torch.no_grad()
def _prefill_raw(
    backbone: Backbone, window: int | None, tokens: torch.Tensor, room: int
) -> tuple[CachedDecoder, torch.Tensor]:
    decoder = CachedDecoder(backbone, room=room)
    return decoder, decoder.next_logits(tokens if window is None else tokens[:, -window:])


@torch.no_grad()
def _prefill_compressed(
    compressor: Compressor, ratio: int, tokens: torch.Tensor, room: int
) -> tuple[CachedDecoder, torch.Tensor]:
    count = -(-tokens.shape[1] // compressor.spec.segment)
    sweep = Sweep(split_segments(tokens, tokens, compressor.spec, [ratio] * count), compressor)
    store = encode(sweep)
    last = sweep.segments[-1]
    decoder = memory_decoder(compressor, last.sink, store.view(*sweep.schedule.span(count - 1)), ratio, room)
    del store
    return decoder, decoder.next_logits(torch.cat([last.before, last.tokens], 1))


@torch.no_grad()
def encode(sweep: Sweep) -> MemoryStore:
    """Return the memories of all segments but the last, several segments in a pass if none depends on another."""
    store = sweep.new_store()
    sweep.write_all(store, range(len(sweep.slots)))
    return store


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_efficiency(config: Efficiency, subject: Subject, ratios: Sequence[int], work: Work) -> Outcome:
    """Return the record of `eval efficiency`."""
    backbone, compressor, description = subject
    window = config.window or backbone.window
    ways = ways_of(backbone, compressor, ratios, window)
    known = [*backbone.model.parameters(), *(compressor.parameters() if compressor is not None else ())]
    # of each point one run that counts memory and warms up, then the timed ones
    total = len(config.lengths) * len(ways) * (config.num_repeats + 1)
    with work.progress("efficiency", total, "runs") as advance:
        points = evaluate_efficiency(backbone, ways, config, known, advance)
    notes = window_notes(backbone, ways, config.lengths)
    protocol = {
        "id": "efficiency/prefill-decode",
        "definition": _DEFINITION,
        "memory": _MEMORY["cuda" if backbone.device.type == "cuda" else "cpu"],
        "num_repeats": config.num_repeats,
        "num_new_tokens": config.num_new_tokens,
        "window": window,
        "bytes_per_position": bytes_per_position(backbone),
        "seed": config.seed,
        "notes": notes,
    }
    results = [asdict(point) for point in points]
    return Outcome(record=result_record("efficiency", description, protocol, None, results=results), notes=notes)


def evaluate_efficiency(
    backbone: Backbone,
    ways: Sequence[Way],
    config: Efficiency,
    known: Sequence[torch.Tensor] = (),
    advance: Callable[[int], None] = lambda amount: None,
) -> list[EfficiencyPoint]:
    """Return one point per length and way, shortest first.

    Args:
        known: tensors of model and compressor, whose memory is not counted.
        advance: called with the number of runs just made.
    """
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = backbone.embedding.weight.shape[0]
    points = []
    for length in sorted(config.lengths):
        tokens = torch.randint(0, vocabulary, (1, length), generator=generator).to(backbone.device)
        measured = [_Best(way, tokens, config.num_new_tokens, known) for way in ways]
        # the ways take turns, so that a slow moment of the machine hits all of them
        for run in range(config.num_repeats + 1):
            for best in measured:
                best.run(count_memory=run == 0)
                advance(1)
        points += [best.point(bytes_per_position(backbone)) for best in measured]
    return points


class _Best:
    """The best of several runs of one way at one length."""

    def __init__(self, way: Way, tokens: torch.Tensor, num_new: int, known: Sequence[torch.Tensor]) -> None:
        self.way, self.tokens, self.num_new, self.known = way, tokens, num_new, [*known, tokens]
        self.prefill = self.decode = float("inf")
        self.peak = self.slots = self.bytes = 0

    def run(self, count_memory: bool) -> None:
        """Prefill and decode once: timed, or with memory counted."""
        if not count_memory:
            prefill, decode = self._run()
            self.prefill, self.decode = min(self.prefill, prefill), min(self.decode, decode)
        elif self.tokens.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.tokens.device)
            before = torch.cuda.memory_allocated(self.tokens.device)
            self._run()
            self.peak = torch.cuda.max_memory_allocated(self.tokens.device) - before
        else:
            with MemoryTracker(self.known) as tracker:
                self._run()
            self.peak = tracker.peak

    def _run(self) -> tuple[float, float]:
        """Return (seconds of the prefill, seconds per new token)."""
        start = _now(self.tokens.device)
        decoder, logits = self.way.prefill(self.tokens, self.num_new)
        ready = _now(self.tokens.device)
        self.slots, self.bytes = decoder.length, decoder.num_bytes
        for _ in range(self.num_new):
            logits = decoder.next_logits(logits.argmax(-1, keepdim=True))
        return ready - start, (_now(self.tokens.device) - ready) / self.num_new

    def point(self, token: int) -> EfficiencyPoint:
        """Return what was measured; `token` is the bytes of one position."""
        length = self.tokens.shape[1]
        assert self.slots == self.way.slots(length), "the closed form and the cache disagree"
        return EfficiencyPoint(
            way=self.way.name,
            ratio=self.way.ratio,
            length=length,
            prefill_seconds=self.prefill,
            prefill_tokens_per_second=length / self.prefill,
            prefill_microseconds=1e6 * self.prefill / length,
            decode_tokens_per_second=1 / self.decode,
            slots=self.slots,
            kv_bytes=self.bytes,
            kv_bytes_per_token=self.bytes / length,
            kv_bytes_formula=token * self.slots,
            marginal_bytes_formula=self.way.bytes_per_token,
            peak_bytes=self.peak,
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()  # what else the machine does counts little
    return time.perf_counter()


def window_notes(backbone: Backbone, ways: Sequence[Way], lengths: Sequence[int]) -> list[str]:
    """Return a line if a way goes beyond the positions that the model was made for."""
    beyond = []
    for way in ways:
        far = [f"{length:,}" for length in sorted(lengths) if way.slots(length) > backbone.window]
        name = way.name if way.ratio is None else f"{way.name} {way.ratio}x"
        beyond += [f"{name} at {', '.join(far)}"] if far else []
    what = f"Beyond the model's {backbone.window:,} positions, and timed all the same (RoPE has no limit)"
    return [f"{what}: {'; '.join(beyond)}."] if beyond else []
