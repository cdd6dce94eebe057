"""A fine-tuning config, checked and translated: Trainer arguments, and the fingerprint of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from longext.attention.backends import BACKENDS
from longext.attention.bands import is_remap
from longext.attention.variant import ATTENTION_VARIANTS
from longext.errors import ConfigError, MissingExtraError
from longext.extras import has, require
from longext.options import DataConfig, RopeConfig
from longext.processes.group import forget_half_a_launch, is_launched, is_sharded, num_processes
from longext.processes.launcher import is_shrunk_launch, missing_variables
from longext.settings import LENGTH, check_names
from longext.training.config import LONGCE, FinetuneConfig, TrainingConfig
from longext.training.loading import attention_of, training_device
from longext.training.sweep import OFF, chunk_tokens

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
# Settings that decide which numbers come next: a checkpoint continues only a run that agrees on them.
DECIDING = (
    "prompt", "lora_r", "lora_alpha", "batch_size", "accumulation", "learning_rate", "schedule", "warmup_steps",
    "weight_decay", "max_grad_norm", "seed", "dtype", "sequence_parallel",
)  # fmt: skip
DECIDING_FINETUNE = (
    "method", "task", "window", "positions", "mixed_window", "short_share", "separate_documents", "tuning", "norms",
    "lora_dropout", "lora_targets", "quantize", "group_size", "group_ratio", "tile", "loss_chunk",
    *(field.name for field in dataclasses.fields(RopeConfig)), *DECIDING,
)  # fmt: skip


def check_finetune_config(config: FinetuneConfig) -> None:
    """Raise ConfigError for values out of range or combinations that cannot run; reads no weights."""
    check_data(config)
    if config.backend != "auto":
        BACKENDS[config.backend]
    check_names(config)
    _check_numbers(config)
    _check_combinations(config)
    check_processes(config)
    _check_sharing(config)
    check_reporting(config.report_to)


def check_data(config: DataConfig) -> None:
    """Raise ConfigError if no data is named: a default would train on a story without a word."""
    if not config.data:
        raise ConfigError(
            "Give --data: a text file, folder, .jsonl, .parquet, Hub dataset id, or sample (bundled story)."
        )


def _check_numbers(config: FinetuneConfig) -> None:
    check_optimiser(config)
    if not 0 < config.group_ratio <= 1:
        raise ConfigError(f"--group-ratio must be above 0 and at most 1, got {config.group_ratio:g}.")
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"`lora_dropout` must be at least 0 and below 1, got {config.lora_dropout:g}.")
    if config.method == "none" and config.factor is not None:
        told = f"--factor {config.factor:g} needs a --method to apply it, for example --method linear."
        raise ConfigError(told).about("method")


def check_optimiser(config: TrainingConfig) -> None:
    """Raise ConfigError for a learning rate or clipping norm out of range, or evaluation without data for it."""
    if not 0 < config.learning_rate < float("inf"):
        raise ConfigError(f"--learning-rate must be above 0, got {config.learning_rate:g}.")
    if not config.max_grad_norm > 0:
        raise ConfigError(f"`max_grad_norm` must be above 0 (1 is usual), got {config.max_grad_norm:g}.")
    if config.eval_data is None and (config.eval_lengths or config.eval_every):
        raise ConfigError("--eval-lengths and --eval-every say how to measure: add --eval-data to measure on.")


def _check_combinations(config: FinetuneConfig) -> None:
    if config.positions == "pose" and config.window is None:
        raise ConfigError("--positions pose trains on short windows: add --window (for example the trained length).")
    if config.window is not None and config.positions != "pose":
        raise ConfigError("--window is the row length of --positions pose: add it, or leave --window out.")
    if config.positions == "pose" and config.sequence_parallel > 1:
        raise ConfigError("--positions pose has short rows: sequence parallelism has nothing to share there.")
    _check_mixed_window(config)
    if config.quantize != "none" and config.tuning == "full":
        raise ConfigError("--tuning full cannot train quantised weights: use --quantize none or a LoRA tuning.")
    if config.task == "sft" and attention_of(config) == "s2-wrapped":
        raise ConfigError("s2-wrapped needs rows without padding or documents: use --attention s2 for sft.")
    if config.separate_documents and attention_of(config) == "s2-wrapped":
        raise ConfigError("s2-wrapped cannot keep documents apart (its roll crosses them): use --attention s2.")
    _check_remap(config)
    _check_layers(config)
    _check_loss(config)


def _check_loss(config: FinetuneConfig) -> None:
    """Raise ConfigError for what the weights of LongCE are not defined for, or cannot be computed under."""
    if config.loss != LONGCE:
        if config.short_context is not None:
            raise ConfigError("--short-context is the short window of --loss longce: add it, or leave it out.")
        return
    for flag, is_on in (
        ("--task sft", config.task == "sft"),
        ("--positions pose", config.positions == "pose"),
        ("`separate_documents`", config.separate_documents),
        ("--mixed-window", config.mixed_window),
        ("--sequence-parallel", config.sequence_parallel > 1),
        ("--context-parallel", config.context_parallel > 1),
        ("FSDP or DeepSpeed", is_sharded()),
    ):
        if is_on:
            raise ConfigError(
                f"--loss longce reads every row as one text, whole and in short windows, on one device: leave {flag} "
                "out, or use --loss plain."
            )


def _check_remap(config: FinetuneConfig) -> None:
    if not is_remap(config.method):
        return
    for flag, is_on in (
        ("--attention", config.attention not in (None, "full")),
        ("--positions pose", config.positions == "pose"),
        ("--sweep", config.sweep != OFF),
        ("--mixed-window", config.mixed_window),
        ("--sequence-parallel", config.sequence_parallel > 1),
        ("--context-parallel", config.context_parallel > 1),
    ):
        if is_on:
            raise ConfigError(
                f"--method {config.method} decides what attention sees of whole rows: leave {flag} out, or choose "
                "another method."
            )


def _check_mixed_window(config: FinetuneConfig) -> None:
    """Raise ConfigError for what cannot go with rows of several windows."""
    if not config.mixed_window:
        if config.short_share is not None:
            raise ConfigError("--short-share says how many rows of --mixed-window are short: add it, or leave it out.")
        return
    for flag, is_on in (
        ("--positions pose", config.positions == "pose"),
        ("--sweep", config.sweep != OFF),
        ("--sequence-parallel", config.sequence_parallel > 1),
        ("--context-parallel", config.context_parallel > 1),
        ("--attention s2-wrapped", attention_of(config) == "s2-wrapped"),
        ("--task sft with --short-share", config.task == "sft" and bool(config.short_share)),
    ):
        if is_on:
            raise ConfigError(f"--mixed-window needs whole documents in one piece of a row: leave {flag} out.")


def _check_layers(config: FinetuneConfig) -> None:
    if config.tile is not None and config.kernels == "compile":
        raise ConfigError("--tile runs what --kernels compile has compiled a tile at a time: give one of them.")
    if config.nested > 1 and not config.checkpointing:
        raise ConfigError("--nested shares the inputs of checkpointed layers: leave gradient checkpointing on.")
    if config.checkpoint_every > 1 and not config.checkpointing:
        raise ConfigError("--checkpoint-every chooses checkpointed layers: leave gradient checkpointing on.")
    if config.nested > 1 and config.checkpoint_every > 1:
        raise ConfigError(
            f"--nested {config.nested} needs every layer checkpointed: leave --checkpoint-every "
            f"{config.checkpoint_every} out."
        )


def check_processes(config: TrainingConfig) -> None:
    """Raise ConfigError for a device, an offload or a number of processes that this machine cannot give."""
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(
            f"--device for training must be auto, cpu, cuda or mps, got '{config.device}'. To choose a GPU set "
            "CUDA_VISIBLE_DEVICES; for several use --num-processes."
        )
    if missing_variables():
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, and {', '.join(missing_variables())} not: the processes of a run need all "
            "that torchrun sets. Start with torchrun, or unset them for a run of one process."
        )
    if is_shrunk_launch():
        raise ConfigError(
            "`accelerate launch` was asked for several processes and started one, which is what it does on a CPU, "
            "without FSDP or DeepSpeed: use GPUs, or --num-processes or torchrun instead of accelerate."
        )
    if world_size(config) % config.sequence_parallel:
        raise ConfigError(
            f"--sequence-parallel {config.sequence_parallel} needs a number of processes that it divides, this run has "
            f"{world_size(config)}: add --num-processes {config.sequence_parallel}."
        )
    device = training_device(config)
    if config.offload and device.type != "cuda":
        raise ConfigError("--offload moves activations from a GPU to CPU memory: it needs a CUDA device.")
    if config.offload and not config.checkpointing:
        raise ConfigError("--offload stores the inputs of checkpointed layers: leave gradient checkpointing on.")
    if (
        config.num_processes > 1
        and not is_launched()
        and device.type == "cuda"
        and config.num_processes > torch.cuda.device_count()
    ):
        raise ConfigError(
            f"--num-processes {config.num_processes}: this machine has {torch.cuda.device_count()} GPU(s), one for "
            "each process. Use torchrun or accelerate launch for several machines."
        )


def rows_per_step(config: TrainingConfig) -> int:
    """Return the rows of one optimiser step, all processes together."""
    shared = config.sequence_parallel * config.context_parallel
    return config.batch_size * config.accumulation * world_size(config) // shared


def world_size(config: TrainingConfig) -> int:
    """Return the processes of the run: those that were launched, or those that will be."""
    return num_processes() if is_launched() else config.num_processes


def _check_sharing(config: FinetuneConfig) -> None:
    device = training_device(config)
    if config.quantize != "none" and device.type != "cuda":
        raise ConfigError(
            "--quantize nf4 needs a CUDA device: on a CPU bitsandbytes repacks 4-bit weights at the first evaluation, "
            "and gradients through them are wrong from then on. Leave --quantize out."
        )
    if config.sweep != OFF:
        _check_sweep(config)
    elif config.kv_memory is not None:
        raise ConfigError("--kv-memory is for the keys and values of a sweep: add --sweep, or leave it out.")
    if config.sequence_parallel > 1 and config.context_parallel > 1:
        raise ConfigError("Give either --sequence-parallel or --context-parallel, not both.")
    sharded = is_sharded()
    if sharded and config.eval_data is not None:
        raise ConfigError(
            "--eval-data needs whole weights, and this accelerate configuration shards them: leave it out, and measure "
            "the merged model with `longext eval ppl`."
        )
    for flag, is_on in (("--tile", config.tile is not None), ("--nested", config.nested > 1)):
        if sharded and is_on:
            raise ConfigError(f"{flag} has not been tried under FSDP or DeepSpeed, which this configuration asks for.")
    if sharded and device.type == "cpu":
        raise ConfigError(
            "This accelerate configuration asks for FSDP or DeepSpeed, and there is no GPU. accelerate ignores FSDP on "
            "a CPU (it would train plain data parallel): use GPUs, or a configuration without it."
        )
    if config.context_parallel > 1:
        _check_context_parallel(config, device, sharded)


def _check_sweep(config: FinetuneConfig) -> None:
    """Raise ConfigError for what a sweep cannot do."""
    chunk_tokens(config.sweep, LENGTH, None)  # refused now if it is no number
    attention = attention_of(config)
    if ATTENTION_VARIANTS[attention].leaks:
        raise ConfigError(
            f"--sweep needs attention without later tokens, and {attention} has some: use --attention s2."
        )
    if config.kv_memory is not None and attention != "full":
        raise ConfigError(
            f"--kv-memory is for full attention: what chunks keep under {attention} waits in host memory. Leave it out."
        )
    if config.kv_memory is not None and training_device(config).type != "cuda":
        raise ConfigError(
            "--kv-memory divides what a sweep keeps between a GPU and host memory: it needs a CUDA device."
        )
    if config.sequence_parallel > 1 or config.context_parallel > 1:
        raise ConfigError(
            "--sweep has one chunk of a row on a GPU at a time: there is nothing to share with --sequence-parallel or "
            "--context-parallel. Leave one of them out."
        )
    if is_sharded():
        raise ConfigError(
            "--sweep runs a row in many backward passes and adds gradients up itself, which FSDP and DeepSpeed do not "
            "allow: start it with --num-processes, torchrun or an accelerate configuration for plain data parallel."
        )


def _check_context_parallel(config: FinetuneConfig, device: torch.device, sharded: bool) -> None:
    if device.type != "cuda" or not sharded:
        raise ConfigError(
            "--context-parallel is accelerate's, for CUDA devices under FSDP2: start with `accelerate launch "
            "--config_file recipes/accelerate/fsdp2.yaml`, or use --sequence-parallel, which runs anywhere."
        )
    if config.task == "sft" or config.separate_documents or config.positions == "pose":
        raise ConfigError(
            "--context-parallel cannot keep examples or documents apart, nor skip positions: use it for plain "
            "pretraining, or --sequence-parallel."
        )
    if world_size(config) % config.context_parallel:
        raise ConfigError(
            f"--context-parallel {config.context_parallel} must divide the number of processes, {world_size(config)}."
        )
    if attention_of(config) != "full":
        raise ConfigError(
            f"--context-parallel knows full attention alone, got {attention_of(config)}: use --attention full, "
            "or --sequence-parallel, which carries S2-Attn."
        )


def check_reporting(report_to: str) -> None:
    """Raise MissingExtraError if the package that `--report-to` names is not installed."""
    if report_to == "wandb":
        require("--report-to wandb", ["wandb"])
    elif report_to != "none" and not has(report_to):
        raise MissingExtraError(f"--report-to {report_to} needs the package {report_to}: pip install {report_to}")


def trainer_arguments(
    config: TrainingConfig, directory: Path, device: torch.device, autocast: bool, warmup_steps: int | None = None
) -> Any:
    """Return the TrainingArguments of a run: AdamW (0.9, 0.95), warm-up, clipping, no evaluation of Trainer's own.

    Args:
        autocast: matrix products run in bfloat16. It comes from `dtype` alone: what an accelerate configuration says
            under `mixed_precision` is not used.
        warmup_steps: those of the run that is resumed (default: `warmup_of`).
    """
    from transformers import TrainingArguments

    forget_half_a_launch()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if autocast else "no"
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=config.num_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULES[config.schedule],
        warmup_steps=warmup_of(config) if warmup_steps is None else warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        bf16=autocast,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        report_to=config.report_to,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        **_parallelism(config),
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # one process drives one GPU: several visible ones must not become nn.DataParallel
    return arguments


def warmup_of(config: TrainingConfig) -> int:
    """Return the warm-up steps of a new run: as asked, at most half of its steps."""
    return min(config.warmup_steps, config.num_steps // 2)


def _parallelism(config: TrainingConfig) -> dict[str, Any]:
    if config.context_parallel == 1:
        return {}
    from accelerate.parallelism_config import ParallelismConfig

    return {"parallelism_config": ParallelismConfig(cp_size=config.context_parallel)}


def fingerprint(
    config: TrainingConfig,
    settings: dict[str, Any],
    model_config: dict[str, Any],
    base_weights: str,
    data: str,
    processes: int,
) -> dict[str, Any]:
    """Return the fingerprint of a run with these settings on this model and data.

    `num_steps` is compared only if the schedule depends on it: a constant one may be prolonged, and keeps the
    warm-up that it began with (`warmup_used`; `warmup_steps` is what was asked for). `threads` is no reason to refuse
    either, but sums on a CPU depend on it, so a run that is resumed takes that of its checkpoint.
    """
    text = json.dumps(model_config, sort_keys=True)
    return {
        "model_config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "base_weights": base_weights,
        "data": data,
        "processes": processes,
        "num_steps": config.num_steps if config.schedule != "constant" else None,
        "warmup_used": warmup_of(config),
        "last_step": config.num_steps,
        "threads": torch.get_num_threads(),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
    }
