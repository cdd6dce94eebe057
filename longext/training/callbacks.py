"""What a run reports while it trains: a metrics file, progress, and perplexity by length with full attention."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from longext.errors import DataError, TrainingError
from longext.untrusted import fields, json_lines

METRICS_NAME = "metrics.jsonl"
Report = Callable[[int, str], None]  # (tokens since the last call, a note such as "loss 2.31")
Measure = Callable[[int], "dict[str, Any] | None"]  # step -> keys of a line; None in a process that measures nothing


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Write one JSON line per logged step, and feed the progress display.

    Args:
        path: the metrics file, or None on processes that write nothing.
        tokens_per_step: of the whole run, all processes together.
        extra: what else a run logs: kept in its lines.

    Attributes:
        on_progress: called with tokens and the last loss.
    """

    def __init__(self, path: Path | None, tokens_per_step: int, extra: tuple[str, ...] = ()) -> None:
        self.path, self.tokens_per_step, self.extra = path, tokens_per_step, extra
        self.on_progress: Report | None = None
        self.log: Callable[[dict[str, float]], None] | None = None  # Trainer's own, for TensorBoard and W&B
        self._last = 0.0  # when the steps that are not logged yet began
        self._step_ended = 0.0
        self._last_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; after a resume, drop the lines that came after the checkpoint."""
        state.compute_steps(args, state.max_steps)  # a checkpoint brings the save_every and log_every it was made with
        self._last = self._step_ended = time.perf_counter()
        self._last_step = state.global_step
        if self.path is not None:
            keep_metrics_until(self.path, state.global_step)
        if self.on_progress and state.global_step:
            self.on_progress(state.global_step * self.tokens_per_step, "resumed")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """End the run before a gradient that is not finite reaches a weight."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"The gradient norm is {float(norm)} at step {state.global_step + 1}; no weight was changed. Lower "
                "--learning-rate, or go on from the last checkpoint, if there is one, with --resume."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Log the last step too, whatever `log_every` is."""
        self._step_ended = time.perf_counter()
        if state.global_step == state.max_steps:
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Write the line of this step."""
        if "loss" not in logs:
            return
        now, steps = time.perf_counter(), state.global_step - self._last_step
        tokens = steps * self.tokens_per_step
        line = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens": state.global_step * self.tokens_per_step,
            "tokens_per_second": tokens / (now - self._last),
            "peak_memory_gib": peak_memory(args.device) / 2**30,
            **{name: value for name, value in logs.items() if name in self.extra},
        }
        self._last, self._last_step = now, state.global_step
        self._write(line)
        if self.on_progress:
            memory = f"{line['peak_memory_gib']:.1f} GiB"
            self.on_progress(tokens, f"step {state.global_step}, loss {line['loss']:.4f}, {memory}")

    def evaluation(self, step: int, perplexity: dict[int, float], **facts: Any) -> None:
        """Write the perplexities by length measured at `step`, and keep their time out of the training rate.

        Args:
            facts: further keys of the line.
        """
        self._write({"step": step, "perplexity": {str(n): value for n, value in perplexity.items()}, **facts})
        if self.log is not None:
            self.log({f"perplexity_{length}": value for length, value in perplexity.items()})
        self._last += time.perf_counter() - self._step_ended
        if self.on_progress:
            self.on_progress(0, ", ".join(f"ppl {value:.2f} at {length:,}" for length, value in perplexity.items()))

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class Evaluate(TrainerCallback):  # type: ignore[misc]
    """Measure before the first step, every `every` steps and after the last, and write what was measured."""

    def __init__(self, measure: Measure, metrics: Metrics, every: int | None) -> None:
        self.measure, self.metrics, self.every = measure, metrics, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the model as it is before training."""
        if state.global_step == 0:
            self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Measure at the chosen steps."""
        if state.global_step == state.max_steps or (self.every and state.global_step % self.every == 0):
            logs_this_step = control.should_log
            self._measure(state.global_step)
            control.should_log = logs_this_step  # which the log of the measurement took away
        return control

    def _measure(self, step: int) -> None:
        if (line := self.measure(step)) is not None:
            self.metrics.evaluation(step, **line)


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step` (what an interrupted run wrote after its last checkpoint)."""
    if not path.is_file():
        return
    lines = [line for line in read_metrics(path) if line["step"] <= step and step > 0]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line that was cut off in writing is left out."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(DataError):
        for where, line in json_lines(path, constant=float, want=dict):
            fields(line, where, {"step": int})
            lines.append(line)
    return lines


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
