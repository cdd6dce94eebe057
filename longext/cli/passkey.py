"""`longext passkey`: retrieval accuracy by length and depth."""

from __future__ import annotations

from typing import Annotated

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.cli.output import deliver, open_output
from longext.evals.config import PasskeyConfig

_DEFAULT = PasskeyConfig(model="")
_FORM = "SCORE or LENGTH=SCORE"


@app.command("passkey")
def passkey(
    ctx: typer.Context,
    model: opt.Model = None,
    lengths: opt.Lengths = opt.join(_DEFAULT.lengths),
    depths: opt.Depths = opt.join(_DEFAULT.depths),
    num_trials: opt.NumTrials = _DEFAULT.num_trials,
    protocol: Annotated[
        str, typer.Option(help="landmark (exact lengths), longlora or yarn (as published).")
    ] = _DEFAULT.protocol,
    filler: Annotated[str, typer.Option(help="landmark, book (the bundled story) or a text file.")] = _DEFAULT.filler,
    num_needles: Annotated[
        int, typer.Option(help="Needles in the text; one of them is asked for.")
    ] = _DEFAULT.num_needles,
    num_digits: Annotated[int, typer.Option(help="Digits of a key.")] = _DEFAULT.num_digits,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(help=f"{_FORM}, a share of 0 to 1 (0.9 for 90%): exit with 1 below it; may be repeated."),
    ] = None,
    method: opt.Method = None,
    factor: opt.Factor = None,
    batch_tokens: opt.BatchTokens = None,
    memory: opt.Memory = None,
    segment: opt.SegmentLength = _DEFAULT.segment,
    device: opt.Device = _DEFAULT.device,
    dtype: opt.Dtype = _DEFAULT.dtype,
    attention: opt.Attention = None,
    seed: opt.Seed = _DEFAULT.seed,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    output: opt.Results = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Hide a number in a long text and ask for it: accuracy with Wilson intervals, heat map, JSON.

    Example: longext passkey books-5m --method yarn --factor 8 --lengths 512,1024,2048
    """
    config = opt.config_with_memory(ctx, PasskeyConfig, recipe, settings)
    _run(config, as_json)


def _run(config: PasskeyConfig, as_json: bool) -> None:
    from longext.cli.models import open_model
    from longext.evals.limits import place_bars, require_bars
    from longext.evals.passkey import (
        accuracy_by_length,
        check_passkey_config,
        num_prompts,
        passkey_record,
        passkey_verdicts,
        timed_passkey,
    )
    from longext.report.console import progress
    from longext.report.plots import passkey_heat_maps
    from longext.report.results import output_directory
    from longext.report.views import passkey_table

    check_passkey_config(config)
    bars = place_bars(config.fail_under, [("", str(length)) for length in sorted(config.lengths)], form=_FORM)
    output = output_directory(config.output, f"passkey-{config.protocol}", config.model)
    open_output(output, config)
    model = open_model(config)
    with progress(f"passkey {config.protocol}", num_prompts(config), "prompts") as advance:
        cells, seconds = timed_passkey(model, config, advance)
    record = passkey_record(model, config, cells, seconds)
    record["bars"] = passkey_verdicts(bars, cells)
    name = opt.titled(config)
    title = f"{name}: passkey/{config.protocol}, %"
    deliver(
        output,
        "passkey",
        config,
        record,
        lambda: [passkey_table(name, config.protocol, cells, accuracy_by_length(cells))],
        lambda: {"passkey": passkey_heat_maps({name: record["results"]}, title=title)},
        as_json=as_json,
    )
    require_bars(record)
