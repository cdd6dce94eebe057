"""`longext eval effective`: the longest length at which retrieval reaches a bar."""

from __future__ import annotations

from typing import Annotated

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.models import open_model
from longext.cli.output import deliver, open_output
from longext.evals.config import EffectiveConfig

_DEFAULT = EffectiveConfig(model="", max_length=0)


@eval_app.command("effective")
def effective(
    ctx: typer.Context,
    model: opt.Model = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest length to try, a multiple of 64.", show_default=False)
    ] = None,
    min_length: Annotated[int, typer.Option(help="First length to try, a multiple of 64.")] = _DEFAULT.min_length,
    bar: Annotated[float, typer.Option(help="Accuracy that counts as passed, 0 to 1.")] = _DEFAULT.bar,
    test: Annotated[
        str, typer.Option(help="passkey (landmark), or needle (RULER's single needle, exact scoring).")
    ] = _DEFAULT.test,
    depths: opt.Depths = opt.join(_DEFAULT.depths),
    num_trials: opt.NumTrials = _DEFAULT.num_trials,
    chat_template: opt.ChatTemplate = None,
    template_arg: opt.TemplateArg = None,
    neutralise_control_tokens: opt.NeutraliseControlTokens = False,
    fail_under: Annotated[
        int | None, typer.Option(help="LENGTH: exit with 1 where no length from it on passed.")
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
    """Search the longest length at which retrieval works: every length tried with its interval, picture, JSON.

    Lengths double until two in a row fail; then the gap above the longest that passed is halved down to 64 tokens.

    Example: longext eval effective books-5m --method yarn --factor 8 --max-length 4096
    """
    _run(opt.config_with_memory(ctx, EffectiveConfig, recipe, settings), as_json)


def _run(config: EffectiveConfig, as_json: bool) -> None:
    from longext.evals.effective import (
        LENGTH_TESTS,
        check_effective_config,
        effective_record,
        num_prompts,
        search_lengths,
    )
    from longext.evals.limits import require_bars
    from longext.report.check_views import effective_figure, effective_table
    from longext.report.console import progress
    from longext.report.results import output_directory

    check_effective_config(config)
    output = output_directory(config.output, "effective", config.model)
    open_output(output, config)
    model = open_model(config)
    check_effective_config(config, model)

    def measure(length: int) -> tuple[int, int]:
        with progress(f"{config.test} at {length:,}", num_prompts(config), "prompts") as advance:
            return LENGTH_TESTS[config.test].run(model, config, length, advance)

    tried = search_lengths(measure, minimum=config.min_length, maximum=config.max_length, bar=config.bar)
    record = effective_record(model, config, tried)
    name = opt.titled(config)
    title = f"{name}: {config.test} accuracy by length"
    deliver(
        output,
        "eval effective",
        config,
        record,
        lambda: [effective_table(name, config.test, config.bar, tried)],
        lambda: {
            "effective": effective_figure(tried, bar=config.bar, trained=model.trained_length, title=title),
        },
        as_json=as_json,
        notes=record["notes"],
    )
    require_bars(record)
