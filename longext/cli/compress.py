"""`longext compress-train`: train a compressor on a frozen model."""

from __future__ import annotations

from typing import Annotated

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.compressor.config import CompressConfig

_DEFAULT = CompressConfig(model="")
_GRADIENTS = "exact, window:S, reservoir:S, reservoir-raw:S, subset:N, stop:S or full"
_HELP = """Train a compressor: every segment of a long text becomes a few memory tokens that the frozen model reads.

uio is UIO-LLMs, trained with the exact gradient (one segment's graph alive at a time), anchor the same with a better
start; icae, gist, autocompressor, rmt and beacon are its family, prefix a control that is blind to the text. Rarer
settings: -c RECIPE or --set key=value.

Example: longext compress-train books-5m --arch anchor --segment 128 --ratio 8 --data BOOKS -o out/books-5m-memory
"""


@app.command("compress-train", help=_HELP)
def compress_train(
    ctx: typer.Context,
    model: opt.Model = None,
    arch: Annotated[
        str, typer.Option(help="uio, anchor, icae, gist, autocompressor, rmt, beacon or prefix.")
    ] = _DEFAULT.arch,
    segment: Annotated[int, typer.Option(help="Tokens of a segment.")] = _DEFAULT.segment,
    ratio: Annotated[
        str, typer.Option(help="Tokens per memory slot; several (4,8,16) are drawn per segment.")
    ] = opt.join(_DEFAULT.ratio),
    data: opt.TrainingData = _DEFAULT.data,
    text_field: opt.TextField = _DEFAULT.text_field,
    split: opt.Split = _DEFAULT.split,
    output: opt.Output = None,
    objectives: Annotated[
        str, typer.Option(help="lm, ae, qa, distill with weights, as in lm:1,ae:0.2.")
    ] = _DEFAULT.objectives,
    gradient: Annotated[str, typer.Option(help=f"{_GRADIENTS}.")] = _DEFAULT.gradient,
    grad_check: Annotated[int | None, typer.Option(help="Compare with the exact gradient every N steps.")] = None,
    document_length: Annotated[
        int | None, typer.Option(help="Tokens of a training document (default: 12 segments, or what fits).")
    ] = None,
    sink: Annotated[int | None, typer.Option(help="First raw tokens that stay readable (default 1; gist 0).")] = None,
    overlap: Annotated[int, typer.Option(help="Last raw tokens that stay readable.")] = _DEFAULT.overlap,
    memory_kind: Annotated[str | None, typer.Option(help="icae: soft (vectors) or kv.")] = None,
    lora_r: Annotated[int, typer.Option(help="LoRA rank.")] = _DEFAULT.lora_r,
    lora_alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = _DEFAULT.lora_alpha,
    init: Annotated[str | None, typer.Option(help="Start from the weights of this compressor.")] = None,
    num_steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _DEFAULT.num_steps,
    batch_size: Annotated[int, typer.Option(help="Documents per process and pass.")] = _DEFAULT.batch_size,
    accumulation: Annotated[int, typer.Option(help="Passes per step.")] = _DEFAULT.accumulation,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = _DEFAULT.learning_rate,
    prompt: Annotated[str, typer.Option(help="qa: auto (chat template, else plain), chat, plain, llama2.")] = "auto",
    eval_data: Annotated[str | None, typer.Option(help="Documents to measure perplexity with memory on.")] = None,
    eval_lengths: Annotated[
        str | None, typer.Option(help="Tokens of context to measure at (default: 1, 4 and 12 segments).")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements (default: start and end).")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = _DEFAULT.save_every,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")] = False,
    num_processes: Annotated[int, typer.Option(help="Processes on this machine (one per GPU).")] = 1,
    sequence_parallel: Annotated[int, typer.Option(help="Processes that share each document's segments.")] = 1,
    report_to: Annotated[str, typer.Option(help="none, tensorboard or wandb.")] = "none",
    device: opt.Device = _DEFAULT.device,
    dtype: opt.Dtype = _DEFAULT.dtype,
    seed: Annotated[int, typer.Option(help="Seed of data order, ratios and initial adapters.")] = 0,
    revision: opt.Revision = None,
    force: opt.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Check, launch processes where several are asked for, train, write."""
    config = opt.config_from(ctx, CompressConfig, recipe, settings)
    from longext.cli.training import run_training
    from longext.compressor.train import plan_compressor
    from longext.evals.midway import measure_memory
    from longext.report.training import CompressReport

    run_training(config, plan_compressor, measure_memory, CompressReport(), dry_run=dry_run, as_json=as_json)
