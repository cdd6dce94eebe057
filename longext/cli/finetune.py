"""`longext finetune`: train a checkpoint at a longer length."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from longext.cli.running import check_directories, close_run, finished_run, kept_once_started, open_run
from longext.errors import ConfigError
from longext.rope.spec import extension_methods
from longext.staging import release_outputs
from longext.training.config import FinetuneConfig

if TYPE_CHECKING:
    from longext.training.loading import Extension
    from longext.training.longlora import FinetuneResult, Run

_DEFAULT = FinetuneConfig(model="")
_METHODS = f"{', '.join(extension_methods())}; none trains the RoPE the model has"
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
    if config.output is None and not dry_run:
        raise ConfigError("Give an output directory with -o.")
    from longext.training.loading import plan_training_rope
    from longext.training.longlora import check_rows
    from longext.training.processes import is_launched, launch
    from longext.training.settings import check_finetune_config

    check_finetune_config(config)
    extension = plan_training_rope(config)
    check_rows(config, extension)
    target = Path(str(config.output))
    work = target if config.output is None else check_directories(config, target, extension.source)
    if dry_run:
        _dry_run(config, as_json)
        return
    if config.num_processes > 1 and not is_launched():
        _prepare(config, extension, work, finished_run(config, target) if config.resume else None)
        release_outputs()  # to the main one of the processes
        raise typer.Exit(launch(config.num_processes, sys.argv[1:], grace=config.stop_grace))
    _train(config, target, work, extension, as_json)


def _dry_run(config: FinetuneConfig, as_json: bool) -> None:
    import tempfile

    from longext.cli.output import show
    from longext.report.training_views import run_table
    from longext.training.longlora import prepare, run_record

    with tempfile.TemporaryDirectory() as directory:
        record = run_record(prepare(config, Path(directory)), 0.0)
    table = run_table(record, config.num_steps, config.model)
    show(record, [table], as_json=as_json, notes=[*record["data"].get("notes", ()), "Dry run: nothing was trained."])


def _prepare(config: FinetuneConfig, extension: Extension, work: Path, prolonged: Path | None) -> None:
    """Tokenise before several processes start: what is wrong with data or checkpoints is said once, by this one."""
    from longext.checkpoint.load import load_tokenizer
    from longext.report.console import tokenising
    from longext.training.longlora import CHECKPOINTS, check_resume, open_training_rows
    from longext.training.settings import fingerprint_of

    tokenizer = load_tokenizer(extension.source, config.trust_remote_code or None)
    rows = open_training_rows(config, extension, tokenizer, tokenising(config.data))
    fingerprint = fingerprint_of(config, extension, rows.report, config.num_processes)
    check_resume(config, work / CHECKPOINTS, fingerprint, prolonged)


def _train(config: FinetuneConfig, output: Path, work: Path, extension: Extension, as_json: bool) -> None:
    from longext.report.console import print_table, progress, say, tokenising
    from longext.report.training_views import run_table
    from longext.training.loading import training_device
    from longext.training.longlora import finetune_checkpoint, num_tokens, run_record
    from longext.training.processes import is_main_process, start_distributed, wait_for_all

    start_distributed(training_device(config), config.collective_timeout)
    prolonged = finished_run(config, output) if config.resume else None

    def start(run: Run) -> None:
        if is_main_process():
            open_run(config, work, output, "finetune")
            for note in run.notes:
                say(note, aside=True)
            if not as_json:
                print_table(run_table(run_record(run, 0.0), config.num_steps, config.model))
            for note in run.rows.report.get("notes", ()):
                say(note, aside=as_json)
        wait_for_all()

    with kept_once_started(work), progress(f"finetune {config.model}", num_tokens(config, extension), "tokens") as bar:
        on_tokens = tokenising(config.data) if is_main_process() else None
        result = finetune_checkpoint(config, work, bar if is_main_process() else None, start, on_tokens, prolonged)
    if is_main_process():
        _finish(config, output, result, as_json)
    wait_for_all()


def _finish(config: FinetuneConfig, output: Path, result: FinetuneResult, as_json: bool) -> None:
    """Write manifest, card, table and picture beside the adapter; give the directory its name; say what is next."""
    from longext.cli.output import show
    from longext.report.console import say
    from longext.report.training_output import write_training_output

    written, record = write_training_output(config, result)
    close_run(result.directory, output)
    show(record, written.tables[1:], as_json=as_json, warnings=written.notes)
    if as_json:
        return
    is_adapter = (output / "adapter_config.json").is_file()
    step = f"longext merge {output} -o {output}-merged" if is_adapter else f"longext verify {output}"
    say(f"Wrote {output} (loss.png, metrics.jsonl, run.json). Next: {step}")
