"""`longext compress-train`: train a compressor on a frozen model, on the engine that fine-tuning uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longext.attention.sequence import make_sequence_group
from longext.checkpoint.checks import check_ids, check_token_cache, embedding_rows
from longext.checkpoint.source import read_config
from longext.compressor.base import Compressor, build_compressor
from longext.compressor.checkpoint import (
    BaseModel,
    find_base,
    load_backbone,
    load_state,
    read_description,
    save_compressor,
)
from longext.compressor.config import CompressConfig
from longext.compressor.objectives import Batch, Objectives, compare_gradients
from longext.compressor.policies import parse_objectives, parse_policy
from longext.compressor.settings import (
    check_compress_config,
    compress_fingerprint,
    document_length,
    global_batch,
    same_shape,
    spec_of,
    token_source,
)
from longext.compressor.spec import CompressorSpec
from longext.data.packing import DocumentRows, collate_rows
from longext.data.rows import cached_tokens
from longext.errors import ConfigError
from longext.evals.memory.midway import Evaluation, load_evaluation
from longext.training.callbacks import METRICS_NAME, Evaluate, Metrics, Report, peak_memory, read_metrics
from longext.training.engine import Engine, Rows, StopOnSignal
from longext.training.loading import enable_checkpointing, training_device
from longext.training.longlora import CHECKPOINTS, find_start, quiet_trainer, raise_if_stopped
from longext.training.processes import is_main_process, main_process_first, num_processes, wait_for_all
from longext.training.settings import trainer_arguments, world_size

_PARTS = ("documents", "ae", "cosine", "relative_error", "norm_ratio")


@dataclass
class CompressRun:
    """One training run in this process.

    Attributes:
        config: the resolved config.
        base: the frozen model it belongs to.
        compressor: what is trained.
        rows: the training documents.
        device: of this process.
        evaluation: what is measured while it trains, or None.
        notes: what the user should know of a run that is resumed.
    """

    config: CompressConfig
    base: BaseModel
    compressor: Compressor
    rows: DocumentRows
    device: torch.device
    evaluation: Evaluation | None
    notes: tuple[str, ...] = ()

    @property
    def num_trainable(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.compressor.parameters() if p.requires_grad)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers of the run."""
        model_config = read_config(self.base.directory)
        processes = world_size(self.config)
        return compress_fingerprint(
            self.config, self.compressor.spec, model_config, self.base.weights, self.rows.report, processes
        )


@dataclass(frozen=True)
class CompressResult:
    """What a finished run leaves behind: where, what (`compress_record`), and the lines of metrics.jsonl."""

    directory: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]


class CompressorEngine(Engine):
    """The engine with a training step that sweeps over a document's segments.

    Gradients are summed over processes here, after the last backward of a step: the sweep has many.

    Args:
        objectives: what is learned, under which gradient policy.
        grad_check: compare the policy's gradient with the exact one every so many steps.
    """

    def __init__(self, *, objectives: Objectives, grad_check: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objectives, self.grad_check = objectives, grad_check
        self._sums: dict[str, float] = {}
        self._checked: dict[str, float] = {}
        self._steps_summed = 0

    def forward_backward(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Sweep over one batch of documents; returns its share of the step's loss."""
        compressor: Compressor = self.accelerator.unwrap_model(model)
        compressor.train()
        inputs = self._prepare_inputs(inputs)
        group = None if self.sequence is None else self.sequence.group
        batch = self._batch(inputs, float(args[0] if args else kwargs["num_items_in_batch"]))
        if self._is_check_due():
            self._checked = compare_gradients(compressor, self.objectives, batch, group)
        parts = self.objectives.backward(compressor, batch, group)
        world = self.args.world_size
        copies = 1 if self.sequence is None else self.sequence.size
        scaled = {"documents": world / copies, "ae": float(world)}  # Trainer reports the mean over processes
        total = torch.stack([value * scaled[name] for name, value in parts.items()]).sum()
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value) * scaled[name]
        if self.accelerator.sync_gradients:
            self._steps_summed += 1
            if world > 1:
                sum_gradients(compressor)
        return total

    def _batch(self, inputs: dict[str, Any], num_items: float) -> Batch:
        copies = 1 if self.sequence is None else self.sequence.size
        share = self.current_gradient_accumulation_steps * self.args.world_size
        numbers = inputs["row"]
        return Batch(
            tokens=inputs["input_ids"],
            labels=inputs["labels"],
            num_tokens=inputs["num_tokens"],
            number=int(numbers[0]),
            per_token=copies / max(1.0, num_items),
            per_row=1.0 / share,
        )

    def _is_check_due(self) -> bool:
        is_due = self.grad_check is not None and self.state.global_step % self.grad_check == 0
        return is_due and bool(self.accelerator.sync_gradients)  # once a step, on its last batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss, averaged over processes as the loss itself is, and the last gradient check."""
        if "loss" in logs and self._steps_summed:
            means = torch.tensor(list(self._sums.values()), device=self.args.device) / self._steps_summed
            if self.args.world_size > 1:
                dist.all_reduce(means)
                means /= self.args.world_size
            logs |= dict(zip(self._sums, means.tolist(), strict=True)) | self._checked
            self._sums, self._checked, self._steps_summed = {}, {}, 0
        super().log(logs, *args, **kwargs)


def sum_gradients(module: torch.nn.Module) -> None:
    """Add up every trained parameter's gradient over all processes."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def prepare_compressor(config: CompressConfig, on_tokens: Callable[[int], None] | None = None) -> CompressRun:
    """Load everything a run needs: the frozen model, the compressor on it, the documents.

    Raises:
        ConfigError, CheckpointError, DataError: something given cannot be used.
    """
    from transformers import set_seed

    base = find_base(config.model, config.revision)
    device = training_device(config)
    backbone, tokenizer = load_backbone(
        base,
        device=str(device),
        dtype=_training_dtype(config, base, device),
        attention=config.attention,
        loss_chunk=config.loss_chunk,
    )
    spec = spec_of(config, backbone.window)
    length = document_length(config, spec, backbone.window)
    set_seed(config.seed)
    compressor = build_compressor(backbone, spec)
    if config.init:
        _start_from(compressor, Path(config.init).expanduser(), base)
    compressor.repeat.requires_grad_("ae" in parse_objectives(config.objectives))
    if config.checkpointing:
        backbone.enable_checkpointing(compressor.adapters, config.offload, enable_checkpointing)
    rows = open_documents(config, compressor, tokenizer, length, on_tokens)
    check_token_cache(rows.cache, embedding_rows(backbone.model), tokenizer, str(config.data))
    evaluation = load_evaluation(config, spec, rows.length, tokenizer)
    for text in evaluation.texts if evaluation else ():
        check_ids(text, embedding_rows(backbone.model), tokenizer, str(config.eval_data))
    return CompressRun(config, base, compressor, rows, device, evaluation)


def _training_dtype(config: CompressConfig, base: BaseModel, device: torch.device) -> str:
    """Return the dtype of the frozen model: float16, whose gradients would need loss scaling, becomes bfloat16."""
    raw = read_config(base.directory)
    stored = raw.get("dtype") or raw.get("torch_dtype")
    is_half = config.dtype == "auto" and device.type != "cpu" and stored == "float16"
    return "bfloat16" if is_half else config.dtype


def _start_from(compressor: Compressor, directory: Path, base: BaseModel) -> None:
    """Take over the weights of an earlier compressor of the same shape on the same model."""
    description = read_description(directory)
    if not base.is_that_of(description["base_weights"]):
        raise ConfigError(f"--init {directory} belongs to {description['base_model']}, another model than this run's.")
    found = CompressorSpec.from_json(description["spec"])
    if not same_shape(found, compressor.spec):
        raise ConfigError(f"--init {directory} is of another shape: {found}; this run asks for {compressor.spec}.")
    load_state(compressor, directory)


def open_documents(
    config: CompressConfig,
    compressor: Compressor,
    tokenizer: Any,
    length: int,
    on_tokens: Callable[[int], None] | None = None,
) -> DocumentRows:
    """Return the training documents of the whole run; the main process tokenises, the others then find its cache."""
    shortest = compressor.schedule(min(compressor.spec.ratios)).shortest
    with main_process_first():
        cache = cached_tokens(token_source(config), tokenizer, length=length, on_progress=on_tokens)
    # nothing predicts the first token, and under a frozen reader what precedes the first memory trains nothing
    return DocumentRows(
        cache,
        length,
        config.seed,
        config.num_steps * global_batch(config),
        minimum=shortest,
        skip=1 if compressor.trains_reader else shortest - 1,
    )


def train_compressor(
    config: CompressConfig,
    directory: Path,
    on_progress: Report | None = None,
    on_start: Callable[[CompressRun], None] | None = None,
    on_tokens: Callable[[int], None] | None = None,
    prolonged: Path | None = None,
) -> CompressResult:
    """Train, and write the compressor into `directory`.

    Args:
        directory: the run's working directory; holds checkpoints and metrics from the first step.
        on_progress: told about tokens done and the last loss.
        on_start: told about the run before its first step.
        on_tokens: told how many tokens are tokenised so far, where the data is not in the cache.
        prolonged: last checkpoint of a finished run, to go on from where `directory` has none.

    Raises:
        ConfigError, CheckpointError, DataError: something given cannot be used.
        TrainingError: the loss became NaN, or a signal stopped the run (a checkpoint is there).
    """
    check_compress_config(config)
    run = prepare_compressor(config, on_tokens)
    beginning = find_start(config, directory / CHECKPOINTS, run.fingerprint, prolonged)
    run.notes = beginning.notes
    metrics = Metrics(
        directory / METRICS_NAME if is_main_process() else None, global_batch(config) * run.rows.length, on_progress
    )
    metrics.extra = _PARTS
    signals = StopOnSignal()
    objectives = Objectives(
        parse_objectives(config.objectives), parse_policy(config.gradient, run.compressor.recurrent), config.seed
    )
    engine = CompressorEngine(
        model=run.compressor,
        args=trainer_arguments(
            config, directory / CHECKPOINTS, run.device, False, beginning.fingerprint["warmup_used"]
        ),
        data_collator=collate_rows,
        rows=Rows(run.rows, config.batch_size, config.sequence_parallel),
        sequence=make_sequence_group(config.sequence_parallel),
        objectives=objectives,
        grad_check=config.grad_check,
        fingerprint=beginning.fingerprint,
        keep_checkpoints=config.keep_checkpoints,
        callbacks=[metrics, signals, *_evaluation(run, metrics)],
    )
    metrics.log = engine.log
    quiet_trainer(engine)
    if on_start:
        on_start(run)
    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with signals:
        engine.train_from(beginning.checkpoint)
    raise_if_stopped(signals, engine, directory)
    return _finish(run, directory, time.perf_counter() - started)


def _evaluation(run: CompressRun, metrics: Metrics) -> list[Evaluate]:
    """Return the callback that measures the next segment with memory and its controls, where data was given for it."""
    found = run.evaluation
    if found is None:
        return []

    def evaluate(step: int) -> None:
        with main_process_first():  # the others measure nothing
            if is_main_process():
                perplexity, controls = found.measure(run.compressor)
                metrics.evaluation(step, perplexity, controls=controls)

    return [Evaluate(evaluate, run.config.eval_every)]


def _finish(run: CompressRun, directory: Path, seconds: float) -> CompressResult:
    if is_main_process():
        save_compressor(directory, run.compressor, run.base)
    record = compress_record(run, seconds)
    wait_for_all()
    lines = read_metrics(directory / METRICS_NAME) if is_main_process() else []
    return CompressResult(directory, record, lines)


def compress_record(run: CompressRun, seconds: float) -> dict[str, Any]:
    """Return the "compress" part of run.json: what was trained, on what, how."""
    config, backbone = run.config, run.compressor.backbone
    total = sum(p.numel() for p in backbone.model.parameters())
    return {
        "spec": run.compressor.spec.to_json(),
        "summary": run.compressor.summary,
        "reference": run.compressor.reference,
        "base_model": run.base.name,
        "window": backbone.window,
        "num_total": total,
        "num_trainable": run.num_trainable,
        "objectives": parse_objectives(config.objectives),
        "gradient": config.gradient,
        "document_length": run.rows.length,
        "documents_per_step": global_batch(config),
        "num_tokens": config.num_steps * global_batch(config) * run.rows.length,
        "data": run.rows.report,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "num_processes": num_processes(),
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(run.device),
    }
