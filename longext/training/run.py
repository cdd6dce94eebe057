"""A training run, whatever it trains: checked once, loaded, begun or resumed, trained, saved.

A command brings two classes: a `RunPlan`, made from the config and small files alone, and the `Run` that it loads.
What is measured while a run trains is handed in by the caller, so nothing here depends on the evaluations.
"""

from __future__ import annotations

import contextlib
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from longext.attention.sequence import make_sequence_group
from longext.data.packing import collate_rows
from longext.errors import ConfigError, TrainingStopped
from longext.processes.group import is_main_process, num_processes, wait_for_all
from longext.threads import set_threads
from longext.training.callbacks import METRICS_NAME, Evaluate, Measure, Metrics, Report, peak_memory, read_metrics
from longext.training.checkpoints import CHECKPOINTS, Beginning, check_resume, find_start
from longext.training.config import TrainingConfig
from longext.training.engine import Engine, Rows, StopOnSignal
from longext.training.settings import rows_per_step, trainer_arguments


@dataclass(frozen=True, kw_only=True)
class RunPlan(ABC):
    """A run that was checked, before weights are read.

    Attributes:
        source: directory of the base model.
        row_length: tokens of a training row.
    """

    config: Any
    source: Path
    row_length: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step, all processes together."""
        return rows_per_step(self.config)

    @property
    def num_rows(self) -> int:
        """Rows of the whole run."""
        return int(self.config.num_steps * self.rows_per_step)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.num_rows * self.row_length

    @property
    def provenance(self) -> dict[str, Any] | None:
        """Where the RoPE that is trained comes from, None if the base's own stays."""
        return None

    @abstractmethod
    def open_rows(self, tokenizer: Any, on_tokens: Callable[[int], None] | None = None) -> Any:
        """Return the rows of the whole run; the main process tokenises, the others then find its cache."""

    @abstractmethod
    def fingerprint(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return what decides the numbers of the run on data of this report, as plain JSON values."""

    @abstractmethod
    def load(self, directory: Path, on_tokens: Callable[[int], None] | None = None) -> Run:
        """Load the model and open the data; nothing is written.

        Args:
            directory: the run's working directory.
            on_tokens: called with the tokens so far, if the data is not in the cache.

        Raises:
            ConfigError, CheckpointError, DataError: something given cannot be used.
        """

    @abstractmethod
    def load_tokenizer(self) -> Any:
        """Return the tokenizer of the base model."""

    def check_before_launch(
        self, directory: Path, prolonged: Path | None, on_tokens: Callable[[int], None] | None = None
    ) -> None:
        """Tokenise, and check data and checkpoints, before several processes start: what is wrong is said once.

        Raises:
            ConfigError, DataError: the data cannot be used, or the last checkpoint belongs to another run.
        """
        rows = self.open_rows(self.load_tokenizer(), on_tokens)
        check_resume(self.config, directory / CHECKPOINTS, self.fingerprint(rows.report), prolonged)


@dataclass(kw_only=True)
class Run(ABC):
    """A loaded run in this process.

    Attributes:
        directory: working directory (`<output>.running`); becomes the output when the run is done.
        model: what Trainer trains.
        rows: the training rows.
        device: of this process.
    """

    plan: Any
    directory: Path
    model: Any
    tokenizer: Any
    rows: Any
    device: torch.device

    logged: ClassVar[tuple[str, ...]] = ()  # what else a line of metrics holds

    @property
    def config(self) -> Any:
        """The resolved config."""
        return self.plan.config

    @property
    def autocast(self) -> bool:
        """True if matrix products run in bfloat16 under autocast."""
        return False

    @abstractmethod
    def make_engine(self, **settings: Any) -> Engine:
        """Return the engine that trains `model` with these settings."""

    @abstractmethod
    def record(self, seconds: float, metrics: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return the part of run.json that says what was trained, on what, how.

        Args:
            metrics: of a finished run.
        """

    @abstractmethod
    def save(self, engine: Engine) -> None:
        """Write what was trained into `directory`; every process calls it."""

    def usable(self, checkpoint: Path) -> str:
        """Return how a checkpoint can be used as it is, a sentence; nothing if it can not."""
        return ""

    def training(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the steps run."""
        return contextlib.nullcontext()

    def cost(self, seconds: float) -> dict[str, Any]:
        """Return the part of every record that says what the run took, and on what."""
        device = self.device
        return {
            "num_processes": num_processes(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(device),
        }


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves behind.

    Attributes:
        directory: where the weights are.
        record: what was trained, on what, how (`Run.record`).
        metrics: the lines of metrics.jsonl.
        extension: the provenance of the RoPE that was trained, if it was.
    """

    directory: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    extension: dict[str, Any] | None = None


@dataclass
class Training:
    """A run that is ready for its first step, or for the one after its last checkpoint.

    Attributes:
        beginning: where it begins, and what the user should know of that.
    """

    run: Run
    engine: Engine
    metrics: Metrics
    signals: StopOnSignal
    beginning: Beginning

    def train(self, on_progress: Report | None = None) -> TrainingResult:
        """Train, and write what was trained into the run's directory.

        Args:
            on_progress: called with tokens done and the last loss.

        Raises:
            TrainingError: the loss became NaN, or a signal stopped the run (a checkpoint is there).
        """
        run, self.metrics.on_progress = self.run, on_progress
        run.directory.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with run.training(), self.signals:
            self.engine.train_from(self.beginning.checkpoint)
        self._raise_if_stopped()
        run.save(self.engine)
        seconds = time.perf_counter() - started
        wait_for_all()
        lines = read_metrics(run.directory / METRICS_NAME) if is_main_process() else []
        record = run.record(seconds, lines)
        return TrainingResult(run.directory, record, lines, run.plan.provenance)

    def _raise_if_stopped(self) -> None:
        """Raise TrainingStopped if a signal ended the run before its last step."""
        done, wanted = self.engine.state.global_step, self.engine.state.max_steps
        if self.signals.received and done < wanted:
            name = signal.Signals(self.signals.received).name
            checkpoint = self.run.directory / CHECKPOINTS / f"checkpoint-{done}"
            raise TrainingStopped(
                f"stopped by {name} after step {done} of {wanted}; a checkpoint is in "
                f"{self.run.directory / CHECKPOINTS}. {self.run.usable(checkpoint)}Run the same command with --resume "
                "to go on.",
                self.signals.received,
            )


def train(
    plan: RunPlan,
    directory: Path,
    *,
    make_measure: Callable[[Any], Measure | None] | None = None,
    on_progress: Report | None = None,
) -> TrainingResult:
    """Load what was planned, train it, and write the result into `directory`.

    Args:
        directory: the run's working directory; holds checkpoints and metrics from the first step.
        make_measure: makes of the loaded run what measures it while it trains, one of `evals.midway`.
        on_progress: called with tokens done and the last loss.

    Raises:
        ConfigError, CheckpointError, DataError: something given cannot be used.
        TrainingError: the loss became NaN, or a signal stopped the run (a checkpoint is there).
    """
    run = plan.load(directory)
    return set_up(run, make_measure(run) if make_measure else None).train(on_progress)


def set_up(run: Run, measure: Measure | None = None, prolonged: Path | None = None) -> Training:
    """Return a loaded run with its engine, from the last checkpoint if it is resumed; nothing is written.

    Args:
        measure: called with a step before the first one, every `eval_every` and after the last; returns the keys of a
            line of metrics ("perplexity" by length among them), or None in a process that measures nothing.
        prolonged: last checkpoint of a finished run, to go on from if the run's directory has none.

    Raises:
        ConfigError: the last whole checkpoint belongs to another run, or the processes disagree.
    """
    config: TrainingConfig = run.config
    if config.eval_data is not None and measure is None:
        raise ConfigError("eval_data asks for measurements: hand in `measure`, one of longext.evals.midway.")
    checkpoints = run.directory / CHECKPOINTS
    beginning = find_start(config, checkpoints, run.plan.fingerprint(run.rows.report), prolonged)
    if beginning.checkpoint is not None:
        set_threads(config.threads, beginning.fingerprint["threads"])
    file = run.directory / METRICS_NAME if is_main_process() else None
    metrics = Metrics(file, run.plan.rows_per_step * run.plan.row_length, extra=run.logged)
    signals = StopOnSignal()
    warmup = beginning.fingerprint["warmup_used"]
    engine = run.make_engine(
        args=trainer_arguments(config, checkpoints, run.device, run.autocast, warmup),
        data_collator=collate_rows,
        rows=Rows(run.rows, config.batch_size, config.sequence_parallel),
        sequence=make_sequence_group(config.sequence_parallel),
        fingerprint=beginning.fingerprint,
        keep_checkpoints=config.keep_checkpoints,
        callbacks=[metrics, signals, *([Evaluate(measure, metrics, config.eval_every)] if measure else [])],
    )
    metrics.log = engine.log
    _quiet_trainer(engine)
    return Training(run, engine, metrics, signals, beginning)


def _quiet_trainer(engine: Engine) -> None:
    """Take away the printing and bars of transformers: longext shows its own."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        engine.remove_callback(callback)
