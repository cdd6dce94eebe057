"""`longext eval efficiency`: time and memory of a growing context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.output import deliver, open_output
from longext.evals.config import EfficiencyConfig

if TYPE_CHECKING:
    from longext.compressor.backbone import Backbone
    from longext.compressor.base import Compressor

_DEFAULT = EfficiencyConfig(model="")


@eval_app.command("efficiency")
def efficiency(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A model, or the directory of a trained compressor.", show_default=False)
    ] = None,
    lengths: opt.Lengths = opt.join(_DEFAULT.lengths),
    ratio: Annotated[str | None, typer.Option(help="Ratios, comma-separated (default: those of training).")] = None,
    window: Annotated[
        int | None, typer.Option(help="Raw tokens of the window to compare with (default: the model's positions).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model it was trained on, where that has moved.")] = None,
    num_new_tokens: Annotated[int, typer.Option(help="Tokens decoded behind the context.")] = _DEFAULT.num_new_tokens,
    num_repeats: Annotated[int, typer.Option(help="Timed runs of each point; the best counts.")] = _DEFAULT.num_repeats,
    device: opt.Device = _DEFAULT.device,
    dtype: opt.Dtype = _DEFAULT.dtype,
    attention: opt.Attention = None,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = _DEFAULT.seed,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    output: opt.Results = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Time prefill and decoding and count KV bytes and peak memory: full attention, a window, a compressor.

    Example: longext eval efficiency out/uio --lengths 4096,16384,65536 --ratio 8,32 --dtype bfloat16
    """
    _run(opt.config_from(ctx, EfficiencyConfig, recipe, settings), as_json)


def _run(config: EfficiencyConfig, as_json: bool) -> None:
    from longext.compressor.base import CompressorSpec
    from longext.compressor.checkpoint import is_compressor, read_description
    from longext.compressor.ratios import check_ratios
    from longext.evals.memory.efficiency import (
        check_efficiency_config,
        efficiency_record,
        evaluate_efficiency,
        num_runs,
        ways_of,
        window_notes,
    )
    from longext.report.console import progress
    from longext.report.efficiency_views import efficiency_by_length, efficiency_table
    from longext.report.results import output_directory
    from longext.report.tables import named

    spec, ratios = None, tuple[int, ...]()
    if is_compressor(config.model):
        description = read_description(Path(config.model).expanduser())
        spec = CompressorSpec.from_json(description["spec"])
        ratios = check_ratios(config.ratio or spec.ratios, spec, description["window"])
    check_efficiency_config(config, spec)
    output = output_directory(config.output, "efficiency", config.model)
    open_output(output, config)
    backbone, compressor, described = _load(config)
    ways = ways_of(backbone, compressor, ratios, config.window or backbone.window)
    known = [*backbone.model.parameters(), *(compressor.parameters() if compressor is not None else ())]
    with progress("efficiency", num_runs(config, len(ways)), "runs") as advance:
        points = evaluate_efficiency(backbone, ways, config, known, advance)
    notes = window_notes(backbone, ways, config.lengths)
    record = efficiency_record(described, backbone, config, points, notes)
    title = f"{named(config.model)} on {described['device']}"
    deliver(
        output,
        "eval efficiency",
        config,
        record,
        lambda: [efficiency_table(config.model, record, points)],
        lambda: {"efficiency": efficiency_by_length(record["results"], title=title)},
        as_json=as_json,
        notes=notes,
    )


def _load(config: EfficiencyConfig) -> tuple[Backbone, Compressor | None, dict[str, Any]]:
    """Return (frozen model, compressor or None, what the record says of them)."""
    from longext.compressor.backbone import Backbone
    from longext.compressor.checkpoint import is_compressor, load_compressor
    from longext.evals.memory.reconstruction import describe_compressor
    from longext.models.hf import load_language_model

    if not is_compressor(config.model):
        model = load_language_model(config)
        return Backbone(model.model), None, model.describe()
    loaded = load_compressor(
        config.model, base=config.base, device=config.device, dtype=config.dtype, attention=config.attention
    )
    return loaded.compressor.backbone, loaded.compressor, describe_compressor(loaded)
