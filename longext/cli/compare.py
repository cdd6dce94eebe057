"""`longext compare`: every method on the same documents, seeds and protocols."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.cli.output import deliver, open_output
from longext.report.config import CompareConfig

_DEFAULT = CompareConfig(model="")


@app.command("compare")
def compare(
    ctx: typer.Context,
    model: opt.Model = None,
    methods: Annotated[str, typer.Option(help="Methods, comma-separated; parameters as name:key=value.")] = opt.join(
        _DEFAULT.methods
    ),
    factor: Annotated[float, typer.Option(help="Target length / trained length.")] = _DEFAULT.factor,
    lengths: opt.Lengths = opt.join(_DEFAULT.lengths),
    data: opt.Data = _DEFAULT.data,
    stride: opt.Stride = _DEFAULT.stride,
    depths: opt.Depths = opt.join(_DEFAULT.depths),
    num_trials: opt.NumTrials = _DEFAULT.num_trials,
    passkey: Annotated[
        bool, typer.Option("--passkey/--no-passkey", help="Include the passkey test.")
    ] = _DEFAULT.passkey,
    max_documents: opt.MaxDocuments = None,
    max_tokens: opt.MaxTokens = None,
    text_field: opt.TextField = _DEFAULT.text_field,
    split: opt.Split = _DEFAULT.split,
    batch_tokens: opt.BatchTokens = None,
    num_buckets: opt.NumBuckets = _DEFAULT.num_buckets,
    num_bootstrap: opt.NumBootstrap = _DEFAULT.num_bootstrap,
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
    """Compare extension methods in one run: perplexity, NLL by position, passkey, short-context price, HTML report.

    Example: longext compare books-5m --methods none,linear,ntk,yarn,dynamic:alpha=8 --factor 8
    """
    config = opt.config_from(ctx, CompareConfig, recipe, settings)
    _run(config, as_json)


def _run(config: CompareConfig, as_json: bool) -> None:
    from longext.report.compare import compare_methods, csv_rows
    from longext.report.console import progress, say
    from longext.report.html import comparison_figures, comparison_page
    from longext.report.results import output_directory
    from longext.report.tables import csv_text
    from longext.report.views import comparison_tables

    output = output_directory(config.output, "compare", config.model)
    open_output(output, config)
    comparison = compare_methods(config, progress, functools.partial(say, aside=as_json))
    tables = functools.partial(comparison_tables, comparison)
    figures = functools.cache(lambda: comparison_figures(comparison))
    deliver(
        output,
        "compare",
        config,
        comparison.record,
        tables,
        figures,
        as_json=as_json,
        notes=[f"Report: {output / 'report.html'}"],
        extra={
            "results.csv": csv_text(csv_rows(comparison)),
            "report.html": lambda: comparison_page(comparison, tables(), figures()),
        },
    )
