"""`longext compress-train`: train a compressor on a frozen model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.cli.running import check_directories, close_run, finished_run, kept_once_started, open_run
from longext.compressor.config import CompressConfig
from longext.errors import ConfigError
from longext.staging import release_outputs

if TYPE_CHECKING:
    from longext.compressor.train import CompressResult, CompressRun

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
    if config.output is None and not dry_run:
        raise ConfigError("Give an output directory with -o.")
    from longext.compressor.checkpoint import find_base
    from longext.compressor.settings import check_compress_config
    from longext.training.processes import is_launched, launch

    check_compress_config(config)
    if dry_run:
        _show_plan(config, as_json)
        return
    target = Path(str(config.output))
    work = check_directories(config, target, find_base(config.model, config.revision).directory)
    if config.num_processes > 1 and not is_launched():
        _prepare(config, work, finished_run(config, target) if config.resume else None)
        release_outputs()  # to the main one of the processes
        raise typer.Exit(launch(config.num_processes, sys.argv[1:], grace=config.stop_grace))
    _train(config, target, work, as_json)


def _prepare(config: CompressConfig, work: Path, prolonged: Path | None) -> None:
    """Check model, data and checkpoints before several processes start: what is wrong is said once, by this one."""
    import gc

    import torch

    from longext.compressor.train import prepare_compressor
    from longext.report.console import tokenising
    from longext.training.longlora import CHECKPOINTS, check_resume

    run = prepare_compressor(config, tokenising(config.data))
    check_resume(config, work / CHECKPOINTS, run.fingerprint, prolonged)
    del run
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the workers need it


def _show_plan(config: CompressConfig, as_json: bool) -> None:
    from longext.cli.output import show
    from longext.compressor.train import compress_record, prepare_compressor
    from longext.report.compressor_views import plan_table

    record = compress_record(prepare_compressor(config), 0.0)
    table = plan_table(record, config.num_steps)
    show(record, [table], as_json=as_json, notes=[*record["data"].get("notes", ()), "Dry run: nothing was trained."])


def _train(config: CompressConfig, output: Path, work: Path, as_json: bool) -> None:
    from longext.compressor.train import compress_record, train_compressor
    from longext.report.compressor_views import plan_table
    from longext.report.console import print_table, progress, say, tokenising
    from longext.training.loading import training_device
    from longext.training.processes import is_main_process, start_distributed, wait_for_all

    start_distributed(training_device(config), config.collective_timeout)
    prolonged = finished_run(config, output) if config.resume else None
    display: list[Any] = []

    def start(run: CompressRun) -> None:
        if is_main_process():
            open_run(config, work, output, "compress-train")
            for note in run.notes:
                say(note, aside=True)
            record = compress_record(run, 0.0)
            if not as_json:
                print_table(plan_table(record, config.num_steps))
            for note in record["data"].get("notes", ()):
                say(note, aside=as_json)
            bar = progress(f"compress-train {config.model}", record["num_tokens"], "tokens")
            display.append(bar)
            display.append(bar.__enter__())
        wait_for_all()

    def advance(amount: int, note: str = "") -> None:
        display[1](amount, note)

    with kept_once_started(work):
        try:
            on_tokens = tokenising(config.data) if is_main_process() else None
            result = train_compressor(config, work, advance if is_main_process() else None, start, on_tokens, prolonged)
        finally:
            if display:
                display[0].__exit__(None, None, None)
    if is_main_process():
        _finish(config, output, result, as_json)
    wait_for_all()


def _finish(config: CompressConfig, output: Path, result: CompressResult, as_json: bool) -> None:
    """Write manifest, card, table and picture beside the weights; give the directory its name; say what is next."""
    from longext.cli.output import show
    from longext.report.compressor_views import write_compressor_output
    from longext.report.console import say

    written, record = write_compressor_output(config, result)
    close_run(result.directory, output)
    show(record, written.tables[1:], as_json=as_json, warnings=written.notes)
    if not as_json:
        say(
            f"Wrote {output} (compressor.safetensors, loss.png, metrics.jsonl, run.json). Next: longext eval ppl "
            f"--memory {output} --data TEXT, or longext generate {output} --context FILE"
        )
