"""`longext finetune`: train a checkpoint at a longer length."""

from __future__ import annotations

from typing import Annotated

import typer

from longext.cli import app
from longext.cli.options import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Output,
    Recipe,
    Revision,
    Settings,
    Split,
    TextField,
    TrainingData,
    config_from,
)
from longext.training.config import FinetuneConfig

_DEFAULT = FinetuneConfig(model="")
_METHODS = "linear, ntk, ntk-by-parts, dynamic, yarn, longrope, llama3, abf; none trains the RoPE the model has"
_HELP = """Extend a checkpoint and train it at its new length (LongLoRA).

Trains with shifted sparse attention (S2-Attn), LoRA, embeddings and norms; every evaluation uses full attention. Writes
an adapter that `longext merge` turns into a standard checkpoint. Rarer settings: -c RECIPE or --set key=value.

Example: longext finetune books-5m --data BOOKS --method linear --target-length 4096 -o out/books-5m-4k-lora
"""


@app.command("finetune", help=_HELP)
def finetune(
    ctx: typer.Context,
    model: Model = None,
    data: TrainingData = _DEFAULT.data,
    text_field: TextField = _DEFAULT.text_field,
    split: Split = _DEFAULT.split,
    method: Annotated[str, typer.Option(help=f"{_METHODS}.")] = _DEFAULT.method,
    target_length: Annotated[int | None, typer.Option(help="Length to train for, in tokens.")] = None,
    factor: Annotated[float | None, typer.Option(help="Target length / trained length, instead.")] = None,
    output: Output = None,
    prompt: Annotated[
        str, typer.Option(help="sft: auto (chat template, else plain), chat, plain, llama2.")
    ] = _DEFAULT.prompt,
    task: Annotated[str, typer.Option(help="pretrain (plain text) or sft (instructions, chats).")] = _DEFAULT.task,
    tuning: Annotated[str, typer.Option(help="lora+embed+norm, lora, lora+embed, lora+norm, full.")] = _DEFAULT.tuning,
    attention: Annotated[
        str | None, typer.Option(help="In training: s2 (default; pose: full), full, short, s2-wrapped.")
    ] = _DEFAULT.attention,
    group_size: Annotated[int | None, typer.Option(help="S2-Attn group in tokens (default: a quarter row).")] = None,
    group_ratio: Annotated[float, typer.Option(help="S2-Attn group as a share of the row.")] = _DEFAULT.group_ratio,
    positions: Annotated[str, typer.Option(help="plain, or pose (skip-wise, with --window).")] = _DEFAULT.positions,
    window: Annotated[int | None, typer.Option(help="pose: row length in tokens.")] = None,
    separate_documents: Annotated[
        bool, typer.Option("--separate-documents", help="No attention across packed documents.")
    ] = False,
    num_steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _DEFAULT.num_steps,
    batch_size: Annotated[int, typer.Option(help="Rows per process and forward pass.")] = _DEFAULT.batch_size,
    accumulation: Annotated[int, typer.Option(help="Forward passes per step.")] = _DEFAULT.accumulation,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = _DEFAULT.learning_rate,
    lora_r: Annotated[int, typer.Option(help="LoRA rank.")] = _DEFAULT.lora_r,
    lora_alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = _DEFAULT.lora_alpha,
    quantize: Annotated[str, typer.Option(help="none, or nf4 (QLoRA; needs bitsandbytes).")] = _DEFAULT.quantize,
    eval_data: Annotated[str | None, typer.Option(help="Documents to measure perplexity on.")] = None,
    eval_lengths: Annotated[
        str | None, typer.Option(help="Lengths to measure (default: trained length to target).")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements (default: start and end).")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = _DEFAULT.save_every,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")] = False,
    num_processes: Annotated[
        int, typer.Option(help="Processes on this machine (one per GPU).")
    ] = _DEFAULT.num_processes,
    sequence_parallel: Annotated[
        int, typer.Option(help="Processes that share each row (Ulysses).")
    ] = _DEFAULT.sequence_parallel,
    context_parallel: Annotated[
        int, typer.Option(help="accelerate's, instead: CUDA, FSDP2, full attention.")
    ] = _DEFAULT.context_parallel,
    offload: Annotated[bool, typer.Option("--offload", help="Keep checkpointed activations in CPU memory.")] = False,
    backend: Annotated[str, typer.Option(help="Attention kernel: auto, flash, sdpa, eager.")] = _DEFAULT.backend,
    report_to: Annotated[str, typer.Option(help="none, tensorboard or wandb.")] = _DEFAULT.report_to,
    device: Device = _DEFAULT.device,
    dtype: Dtype = _DEFAULT.dtype,
    seed: Annotated[int, typer.Option(help="Seed of data order and initial adapter.")] = _DEFAULT.seed,
    revision: Revision = None,
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    as_json: Json = False,
    recipe: Recipe = None,
    settings: Settings = None,
) -> None:
    """Check, launch processes where several are asked for, train, write."""
    config = config_from(ctx, FinetuneConfig, recipe, settings)
    from longext.cli.training import run_training
    from longext.evals.midway import measure_perplexity
    from longext.report.training import FinetuneReport
    from longext.training.longlora import plan_finetune

    run_training(config, plan_finetune, measure_perplexity, FinetuneReport(), dry_run=dry_run, as_json=as_json)
