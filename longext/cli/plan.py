"""`longext plan`: what training at a length will cost, before it is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.cli.output import deliver, open_output, show
from longext.planning.config import PlanConfig

if TYPE_CHECKING:
    from longext.planning.fit import TrainingPlan
    from longext.planning.probe import Probe

_DEFAULT = PlanConfig(model="", length=1)


@app.command("plan")
def plan(
    ctx: typer.Context,
    model: opt.Model = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a training sequence.")] = None,
    gpus: Annotated[str, typer.Option(help="Number and kind, for example 8xA100-80GB.")] = _DEFAULT.gpus,
    method: Annotated[str, typer.Option(help="longlora, lora or full.")] = _DEFAULT.method,
    attention: Annotated[
        str | None, typer.Option(help="s2 or full (default: s2 for longlora, else full).")
    ] = _DEFAULT.attention,
    batch_size: Annotated[int, typer.Option(help="Sequences per GPU at once.")] = _DEFAULT.batch_size,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters on q, k, v, o.")] = _DEFAULT.lora_r,
    group_ratio: Annotated[float, typer.Option(help="S2 group as a fraction of the length.")] = _DEFAULT.group_ratio,
    group_size: Annotated[int | None, typer.Option(help="S2 group in tokens, instead of --group-ratio.")] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute each layer again in the backward pass.")
    ] = _DEFAULT.checkpointing,
    offload: Annotated[bool, typer.Option("--offload", help="Keep layer inputs in host memory.")] = _DEFAULT.offload,
    loss_chunk: Annotated[
        int, typer.Option(help="Tokens whose logits exist at once (>= length: all).")
    ] = _DEFAULT.loss_chunk,
    sharding: Annotated[str, typer.Option(help="auto (first that fits), none, ddp, zero2, fsdp.")] = _DEFAULT.sharding,
    sequence_parallel: Annotated[int, typer.Option(help="GPUs that share each sequence.")] = _DEFAULT.sequence_parallel,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = _DEFAULT.dtype,
    utilisation: Annotated[
        float, typer.Option(help="Fraction of the GPU's peak that is reached.")
    ] = _DEFAULT.utilisation,
    num_tokens: Annotated[int | None, typer.Option(help="Tokens of the whole run, for its duration.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure two steps on this machine and calibrate.")
    ] = _DEFAULT.probe,
    revision: opt.Revision = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Results directory (default: none is written).")
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Work out memory, FLOPs and time of a training run: what fits, the longest length, what each flag buys.

    Example: longext plan meta-llama/Llama-2-7b-hf --length 32768 --gpus 8xA100-80GB
    """
    _run(opt.config_from(ctx, PlanConfig, recipe, settings), as_json)


def _run(config: PlanConfig, as_json: bool) -> None:
    from longext.planning.fit import plan_record, plan_training
    from longext.report.plan_views import plan_tables, probe_table, record_with_probe

    if config.output:
        open_output(Path(config.output), config)
    result = plan_training(config)
    probe = _probe(result) if config.probe else None
    tables = [*plan_tables(result), *([probe_table(probe)] if probe else [])]
    _show(config, result, record_with_probe(plan_record(result), probe), tables, as_json)


def _probe(result: TrainingPlan) -> Probe:
    from longext.checkpoint.source import resolve_model
    from longext.planning.probe import probe_machine

    directory = resolve_model(result.config.model, result.config.revision, weights=False)
    return probe_machine(directory, result.shape, result.setup)


def _show(config: PlanConfig, result: TrainingPlan, record: dict[str, Any], tables: list[Any], as_json: bool) -> None:
    """Print the plan; write it too where a directory was named."""
    notes = [f"note: {note}" for note in result.notes()]
    if config.output:
        from longext.report.plan_views import memory_by_length

        deliver(
            Path(config.output),
            "plan",
            config,
            record,
            lambda: tables,
            lambda: {"memory": memory_by_length(result)},
            as_json=as_json,
            notes=notes,
        )
        return
    show(record, tables, as_json=as_json, notes=notes)
