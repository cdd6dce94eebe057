"""How fast a model reads and writes on this device: measured on the first prompts, not guessed from the device's name.

Shape legend: B rows, n tokens.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch

from longext.models.batching import kv_numbers
from longext.models.throughput.caches import Row, grows, join_rows, row_of

if TYPE_CHECKING:
    from longext.models.hf import HFLanguageModel

_MOST_ROWS = 64
_LEAST_PROMPTS, _LEAST_TOKENS = 8, 8192  # of a run that is worth a probe
_NEW = 8  # tokens read in the time of one written, at least
_LEAST_READ, _MOST_READ = 64, 1024  # tokens of the probe
_PART = 100  # of a run's tokens and time, what each half of the probe takes at most
_GAIN = 1.15  # by which twice the rows have to write more tokens a second
_TOGETHER = 1.5  # what reading prompts in one tensor has to gain, which pads them
_STEPS = 3  # of each number of rows; the fastest counts
_MEMORY_SHARE = 0.3  # of what is free, for keys and values of a batch (they exist twice while a cache grows)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What was measured.

    Attributes:
        token, pair: seconds of reading n tokens by themselves: n * token + n^2 * pair.
        step: seconds of a token of each of `rows` answers; 0 if nothing was to be written.
        rows: answers to write at once: more do not write more tokens a second, or do not fit.
        together: times as fast as one after the other that prompts are read in one tensor; 1 if that gains nothing.
        most_tokens: prompt and new tokens of a batch that fit into the memory that was free.
    """

    token: float
    pair: float
    step: float
    rows: int
    together: float
    most_tokens: int

    def reading(self, num_tokens: int, known: int = 0) -> float:
        """Return the seconds of reading a text whose first tokens are known."""
        return self.token * (num_tokens - known) + self.pair * (num_tokens**2 - known**2)

    def writing(self, num_tokens: int, num_answers: int) -> float:
        """Return the seconds of writing tokens of so many answers, `rows` at once."""
        return self.step * num_tokens / max(1, min(self.rows, num_answers))


@dataclass(frozen=True, kw_only=True)
class Load:
    """What there is to do: prompts, and the tokens that are written at most."""

    prompts: Sequence[Sequence[int]]
    num_new: int

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def is_worth_a_probe(self) -> bool:
        """True if so much is done that measuring a part of it costs little."""
        work = self.num_tokens + _NEW * self.num_new
        return len(self.prompts) >= _LEAST_PROMPTS and work >= _LEAST_TOKENS


def measured_pace(model: Any, load: Load) -> Pace | None:
    """Return the pace of a plain model, measured the first time that a load is worth it; None before.

    It stays with the model until its rotation is changed.
    """
    known: Pace | None = getattr(model, "pace", None)
    if hasattr(model, "workers"):  # a server: its time is not this device's
        return None
    if not load.is_worth_a_probe or known is not None and (known.step or not load.num_new):
        return known
    if not hasattr(model, "pace"):
        return measure_reader(model, load)
    model.pace = measure_pace(model, load)
    found: Pace = model.pace
    return found


def measure_reader(model: Any, load: Load) -> Pace:
    """Return how fast any other `LanguageModel` reads the beginning of a prompt and writes behind it.

    One that reads prompts of equal length together is tried with 2, 4, ... of them, as long as that is faster.
    """
    text = list(sorted(load.prompts, key=len)[len(load.prompts) // 2][: _probe_size(load)])
    alike = max(Counter(map(len, load.prompts)).values())
    best, _ = _timed(model.device, lambda: model.greedy(text, 1))
    step, rows = 0.0, 1
    if load.num_new:
        both, new = _timed(model.device, lambda: model.greedy(text, 1 + _STEPS))
        step = max(0.0, both - best) / max(1, len(new) - 1)
    while hasattr(model, "greedy_rows") and load.num_new and 2 * rows <= min(alike, _MOST_ROWS):
        try:
            seconds, _ = _timed(model.device, partial(model.greedy_rows, [text] * 2 * rows, 1))
        except RuntimeError:  # memory
            break
        if 2 * best < _GAIN * seconds:
            break
        rows, best = 2 * rows, seconds
    token = best / rows / len(text)
    return Pace(token=token, pair=0.0, step=step, rows=rows, together=float(rows), most_tokens=sys.maxsize)


def _probe_size(load: Load) -> int:
    return min(_MOST_READ, max(_LEAST_READ, load.num_tokens // _PART))


@torch.no_grad()
def measure_pace(model: HFLanguageModel, load: Load) -> Pace:
    """Return how fast a model reads the beginning of a middling prompt and writes behind it.

    A hundredth of what there is to read is read, 1,024 tokens at most; then tokens are written at batch 1, 2, 4, ...
    until twice the rows do not write more, or a hundredth of the run's time is used up.
    """
    network, device = model.model, model.device
    middle = sorted(load.prompts, key=len)[len(load.prompts) // 2]
    ids = torch.tensor([list(middle[: _probe_size(load)])], device=device)
    text = ids % network.get_input_embeddings().weight.shape[0]
    most_tokens = _most_tokens(model)

    def read(tokens: torch.Tensor) -> Any:
        return network(input_ids=tokens, use_cache=True, logits_to_keep=1)

    with model.frozen_rope(text.shape[1] + 1 + _STEPS):
        quarter = text[:, : max(4, text.shape[1] // 4)]
        read(text[:, :4])
        short, _ = _timed(device, lambda: read(quarter))
        whole, output = _timed(device, lambda: read(text))
        token, pair = _curve(quarter.shape[1], short, text.shape[1], whole)
        seconds = token * load.num_tokens
        longest = max(map(len, load.prompts))
        step, rows = 0.0, 1
        if load.num_new:
            step, rows = _best_rows(model, output.past_key_values, load, most_tokens // longest, seconds)
        together = _gain(_timed(device, lambda: read(quarter.expand(2, -1)))[0], 2 * short) if rows > 1 else 1.0
        if together > 1 and rows > 2:
            together = _gain(_timed(device, lambda: read(text.expand(4, -1)))[0], 4 * whole)
    return Pace(token=token, pair=pair, step=step, rows=rows, together=together, most_tokens=most_tokens)


def _gain(together: float, apart: float) -> float:
    """Return how many times as fast something is done together, 1 if that is not worth it."""
    return apart / together if apart > _TOGETHER * together else 1.0


def _best_rows(model: HFLanguageModel, cache: Any, load: Load, fitting: int, reading: float) -> tuple[float, int]:
    """Return (seconds of a step, rows) where most tokens a second are written.

    Args:
        cache: of one row, read.
        fitting: rows that fit into memory.
        reading: seconds that reading takes.
    """
    started, row = time.perf_counter(), row_of(cache) if grows(cache) else None
    rows, best = 1, _step_seconds(model, cache, row, 1)
    most = min(_MOST_ROWS, len(load.prompts), fitting)
    spare = (reading + best * load.num_new) / _PART
    while 2 * rows <= most and (rows == 1 or time.perf_counter() - started < spare):
        try:
            step = _step_seconds(model, cache, row, 2 * rows)
        except (RuntimeError, AttributeError, NotImplementedError):  # memory, or a cache that cannot
            break
        if 2 * best < _GAIN * step:
            break
        rows, best = 2 * rows, step
    return best, rows


def _step_seconds(model: HFLanguageModel, cache: Any, row: Row | None, rows: int) -> float:
    """Return the seconds of writing a token behind `rows` copies of a row, the fastest of three."""
    if rows > 1 and row is not None:
        cache = join_rows(model, [row] * rows, _STEPS)
    elif rows > 1:
        cache.batch_repeat_interleave(2)  # it grows with every number of rows
    token = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
    step = partial(model.model, input_ids=token, past_key_values=cache, use_cache=True)
    return min(_timed(model.device, step)[0] for _ in range(_STEPS))


def _curve(few: int, short: float, many: int, whole: float) -> tuple[float, float]:
    """Return (a, b) >= 0 with a n + b n^2 through two measurements, or the line through the longer one."""
    if many <= few:
        return whole / many, 0.0
    pair = (whole / many - short / few) / (many - few)
    token = whole / many - pair * many
    return (token, pair) if pair > 0 and token > 0 else (whole / many, 0.0)


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    _wait(device)
    started = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _most_tokens(model: HFLanguageModel) -> int:
    """Return the tokens whose keys and values fit into a share of the free memory."""
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    each = kv_numbers(model.model.config.get_text_config()) * model.model.dtype.itemsize
    return max(1, int(_MEMORY_SHARE * free / each))


def is_out_of_memory(error: BaseException) -> bool:
    """True for an allocation that failed, on an accelerator or in host memory."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    """Give back what is cached of a failed batch."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
