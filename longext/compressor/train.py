"""`longext compress-train`: train a compressor on a frozen model, on the engine that fine-tuning uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import SAFE_WEIGHTS_NAME

from longext.checkpoint.checks import check_token_cache, embedding_rows
from longext.checkpoint.load import load_config, load_tokenizer
from longext.checkpoint.source import read_config
from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import window_of
from longext.compressor.base import Compressor, build_compressor
from longext.compressor.checkpoint import (
    WEIGHTS,
    BaseModel,
    describe_compressor,
    find_base,
    load_backbone,
    load_state,
    read_description,
    save_compressor,
)
from longext.compressor.config import CompressConfig
from longext.compressor.objectives import Batch, Objectives, compare_gradients
from longext.compressor.policies import parse_objectives, parse_policy
from longext.compressor.schedule import Schedule
from longext.compressor.settings import (
    DECIDING_COMPRESS,
    check_compress_config,
    document_length,
    same_shape,
    shortest_text,
    spec_of,
    token_source,
)
from longext.compressor.spec import CompressorSpec
from longext.data.packing import DocumentRows
from longext.data.rows import cached_tokens
from longext.errors import ConfigError
from longext.processes.group import is_main_process, main_process_first, sum_gradients
from longext.training.engine import Engine
from longext.training.loading import enable_checkpointing, training_device
from longext.training.losses import chunk_for
from longext.training.run import Run, RunPlan
from longext.training.settings import fingerprint, world_size
from longext.untrusted import note


@dataclass(frozen=True, kw_only=True)
class CompressPlan(RunPlan):
    """A compressor's training that was checked; its rows are documents.

    Attributes:
        base: the frozen model.
        spec: the compressor.
        window: positions of the model.
    """

    config: CompressConfig
    base: BaseModel
    spec: CompressorSpec
    window: int

    def load_tokenizer(self) -> Any:
        """Return the tokenizer of the frozen model."""
        return load_tokenizer(self.source)

    def open_rows(self, tokenizer: Any, on_tokens: Callable[[int], None] | None = None) -> DocumentRows:
        """Return the documents of the whole run; the main process tokenises, the others then find its cache."""
        config = self.config
        kind = COMPRESSORS[self.spec.arch]
        schedule = Schedule.of(kind, self.spec, self.spec.ratios)
        shortest = shortest_text(config, schedule)
        with main_process_first():
            cache = cached_tokens(token_source(config), tokenizer, length=self.row_length, on_progress=on_tokens)
        # nothing predicts the first token, and under a frozen reader what precedes the first memory trains nothing
        skip = 1 if kind.trains_reader or shortest < schedule.shortest else shortest - 1
        return DocumentRows(cache, self.row_length, config.seed, self.num_rows, minimum=shortest, skip=skip)

    def fingerprint(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return what decides the numbers of the run on data of this report."""
        config, spec = self.config, self.spec
        settings = {name: getattr(config, name) for name in DECIDING_COMPRESS}
        settings |= {"sink": spec.sink, "memory": spec.memory, "row_length": data["row_length"], "init": config.init}
        settings |= {"fading": True} if config.fading else {}
        processes = world_size(config)
        return fingerprint(
            config, settings, read_config(self.source), self.base.weights, data["tokens_sha256"], processes
        )

    def load(self, directory: Path, on_tokens: Callable[[int], None] | None = None) -> CompressRun:
        """Load the frozen model, the compressor on it and the documents."""
        from transformers import set_seed

        config, device = self.config, training_device(self.config)
        backbone, tokenizer = load_backbone(
            self.base,
            device=str(device),
            dtype=_training_dtype(config, self.base, device),
            attention=config.attention,
            loss_chunk=config.loss_chunk or chunk_for(load_config(self.source).get_text_config().vocab_size),
        )
        set_seed(config.seed)
        compressor = build_compressor(backbone, self.spec)
        if config.fading:  # its readers turn keys
            backbone.check_rotation()
        if config.init:
            _start_from(compressor, Path(config.init).expanduser(), self.base)
        compressor.repeat.requires_grad_("ae" in parse_objectives(config.objectives))
        if config.checkpointing:
            backbone.enable_checkpointing(compressor.adapters, config.offload, enable_checkpointing)
        rows = self.open_rows(tokenizer, on_tokens)
        check_token_cache(rows.cache, embedding_rows(backbone.model), tokenizer, str(config.data))
        return CompressRun(
            plan=self, directory=directory, model=compressor, tokenizer=tokenizer, rows=rows, device=device
        )


def plan_compressor(config: CompressConfig) -> CompressPlan:
    """Check a compressor's training, from config files alone.

    Raises:
        ConfigError: values out of range, or a compressor that does not fit the model's positions.
        CheckpointError: the model cannot be read.
    """
    check_compress_config(config)
    base = find_base(config.model, config.revision)
    window = window_of(load_config(base.directory).get_text_config())
    spec = spec_of(config, window)
    length = document_length(config, spec, window)
    return CompressPlan(config=config, source=base.directory, row_length=length, base=base, spec=spec, window=window)


@dataclass(kw_only=True)
class CompressRun(Run):
    """A loaded compressor's training; `model` is the compressor."""

    plan: CompressPlan
    model: Compressor

    logged = ("documents", "ae", "cosine", "relative_error", "norm_ratio")

    def make_engine(self, **settings: Any) -> CompressorEngine:
        """Return the engine, which sweeps over the segments of each document."""
        config = self.plan.config
        policy = parse_policy(config.gradient, self.model.recurrent)
        objectives = Objectives(parse_objectives(config.objectives), policy, config.seed, config.fading)
        return CompressorEngine(
            model=self.model,
            objectives=objectives,
            grad_check=config.grad_check,
            describe=self.describe,
            **settings,
        )

    def describe(self, checkpoint: Path) -> None:
        """Make a checkpoint a compressor as well, which `--memory` and `--init` take: what Trainer saved, named."""
        weights = checkpoint / WEIGHTS
        weights.unlink(missing_ok=True)
        try:
            weights.hardlink_to(checkpoint / SAFE_WEIGHTS_NAME)
        except OSError:  # a disk without links
            shutil.copyfile(checkpoint / SAFE_WEIGHTS_NAME, weights)
        describe_compressor(checkpoint, self.model, self.plan.base)

    def usable(self, checkpoint: Path) -> str:
        """Return how a checkpoint of a run that was stopped is used."""
        return f"It is a compressor as it stands: use it as --memory {checkpoint}, or copy that folder. "

    def save(self, engine: Engine) -> None:
        """Write the two files of the compressor."""
        if is_main_process():
            save_compressor(self.directory, self.model, self.plan.base)

    def record(self, seconds: float, metrics: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return the "compress" part of run.json."""
        plan, backbone = self.plan, self.model.backbone
        return {
            "spec": plan.spec.to_json(),
            "summary": self.model.summary,
            "reference": self.model.reference,
            "base_model": plan.base.name,
            "window": plan.window,
            "num_total": sum(p.numel() for p in backbone.model.parameters()),
            "num_trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "objectives": parse_objectives(plan.config.objectives),
            **({"fading": True} if plan.config.fading else {}),
            "gradient": plan.config.gradient,
            "document_length": plan.row_length,
            "documents_per_step": plan.rows_per_step,
            "num_tokens": plan.num_tokens,
            "data": self.rows.report,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            **self.cost(seconds),
        }


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

    def forward_backward(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Sweep over one batch of documents; returns its share of the step's loss."""
        compressor: Compressor = self.accelerator.unwrap_model(model)
        compressor.train()
        inputs = self._prepare_inputs(inputs)
        group = None if self.sequence is None else self.sequence.group
        batch = self._batch(inputs, float(num_items_in_batch))
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
            # the ranks of a group return the same tokens' items, so the count has them `copies` times
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


def _training_dtype(config: CompressConfig, base: BaseModel, device: torch.device) -> str:
    """Return the dtype of the frozen model: float16, whose gradients would need loss scaling, becomes bfloat16."""
    raw = read_config(base.directory)
    stored = raw.get("dtype") or raw.get("torch_dtype")
    is_half = config.dtype == "auto" and device.type != "cpu" and stored == "float16"
    return "bfloat16" if is_half else config.dtype


def _start_from(compressor: Compressor, directory: Path, base: BaseModel) -> None:
    """Take over the weights of an earlier compressor of the same shape on the same model."""
    description = read_description(directory)
    recorded = description["base_weights"]
    if not base.has_weights_of(recorded):
        raise ConfigError(f"--init {directory} belongs to {description['base_model']}, another model than this run's.")
    earlier = CompressorSpec.from_json(description["spec"])
    if not same_shape(earlier, compressor.spec):
        raise ConfigError(f"--init {directory} is of another shape: {earlier}; this run asks for {compressor.spec}.")
    load_state(compressor, directory)
    if not base.is_that_of(recorded):
        note(
            f"--init {directory} was trained on {description['base_model']}, which has the same weights and another "
            f"RoPE: {description['window']:,} positions there, {compressor.backbone.window:,} here."
        )
