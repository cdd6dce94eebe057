"""`longext extend`: a longer context without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longext.cli import app
from longext.cli.options import Force, Model, Output, Recipe, Revision, Settings, config_from
from longext.conversion.config import ExtendConfig

_METHODS = "linear, ntk, ntk-by-parts, dynamic, yarn, longrope, llama3, abf"
_EXAMPLE = """Extend a checkpoint's context without training.

The weights are hard-linked, never loaded; the output is a standard checkpoint that plain transformers loads.

Example: longext extend books-5m --method yarn --factor 8 -o out/books-5m-4k
"""


@app.command("extend", help=_EXAMPLE)
def extend(
    ctx: typer.Context,
    model: Model = None,
    method: Annotated[str | None, typer.Option(help=f"{_METHODS}.")] = None,
    factor: Annotated[float | None, typer.Option(help="Target length / trained length, >= 1.")] = None,
    target_length: Annotated[int | None, typer.Option(help="Target length in tokens, instead of --factor.")] = None,
    output: Output = None,
    original_length: Annotated[
        int | None, typer.Option(help="Pre-training length, where the config does not say it.")
    ] = None,
    rope_theta: Annotated[float | None, typer.Option(help="abf: the raised base.")] = None,
    beta_fast: Annotated[
        float | None, typer.Option(help="yarn, ntk-by-parts: turns from which a dimension is kept (32).")
    ] = None,
    beta_slow: Annotated[
        float | None, typer.Option(help="yarn, ntk-by-parts: turns below which it is interpolated (1).")
    ] = None,
    ramp: Annotated[
        str | None, typer.Option(help="yarn, ntk-by-parts: paper (linear in turns) or code (linear in index).")
    ] = None,
    truncate: Annotated[
        bool | None,
        typer.Option("--truncate/--no-truncate", help="Code ramp: whole-dimension ends (default) or exact."),
    ] = None,
    attention_factor: Annotated[
        float | None, typer.Option(help="yarn, ntk-by-parts, longrope: multiplier of cos and sin (yarn: 0.1 ln s + 1).")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="dynamic: 1 is the paper's form, the factor is the other common one.")
    ] = None,
    low_freq_factor: Annotated[
        float | None, typer.Option(help="llama3: turns below which a dimension is interpolated (1).")
    ] = None,
    high_freq_factor: Annotated[float | None, typer.Option(help="llama3: turns from which it is kept (4).")] = None,
    factors: Annotated[
        str | None, typer.Option(help="longrope: JSON file with long_factor and optional short_factor.")
    ] = None,
    revision: Revision = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Start from the bare base theta of a model trained with another RoPE.")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the weights instead of hard-linking them.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Build the new config with transformers and compare it with the plan."),
    ] = True,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Run `longext verify` on the output.")] = False,
    recipe: Recipe = None,
    settings: Settings = None,
) -> None:
    """Plan, show old -> new, write, say what to do next."""
    from longext.conversion.extend import extend_checkpoint, left_out, plan_extension
    from longext.report.console import print_table, say
    from longext.report.views import extension_table
    from longext.staging import hold_output

    config = config_from(ctx, ExtendConfig, recipe, settings)
    if dry_run:
        plan = plan_extension(config)
        print_table(extension_table(plan))
        _say_warnings(plan.warnings, config.check)
        say("Dry run: nothing was written.")
        return
    if config.output is not None:
        hold_output(Path(config.output), config.force)
    plan = extend_checkpoint(config)
    print_table(extension_table(plan))
    for note in left_out(plan.source):
        say(note)
    _say_warnings(plan.warnings, config.check)
    say(f"Wrote {config.output}. Check it: longext verify {config.output}")
    if verify:
        from longext.cli.verify import run_verification

        run_verification(str(config.output), None, logits=True, hashes=True, as_json=False)


def _say_warnings(warnings: tuple[str, ...], check: bool) -> None:
    from longext.report.console import say

    for line in warnings:
        say(f"Warning: {line}")
    if not check:
        say("Not compared with what transformers builds (--no-check): longext verify does it later.")
