"""`longext eval ppl`: perplexity by length under a named protocol."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.cli.output import deliver, open_output
from longext.evals.config import PerplexityConfig

eval_app = typer.Typer(help="Evaluate a model.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(eval_app, name="eval")
_DEFAULT = PerplexityConfig(model="")
_NEXT_SEGMENT = "next-segment"  # the protocol that compares memories


@eval_app.callback()
def _eval() -> None:
    """Evaluate a model under named protocols."""


@eval_app.command("ppl")
def perplexity(
    ctx: typer.Context,
    model: opt.Model = None,
    data: opt.Data = _DEFAULT.data,
    lengths: opt.Lengths = opt.join(_DEFAULT.lengths),
    protocol: Annotated[
        str,
        typer.Option(help="sliding, positional, yarn-truncated, longlora; next-segment is the default with --memory."),
    ] = _DEFAULT.protocol,
    stride: opt.Stride = _DEFAULT.stride,
    method: opt.Method = None,
    factor: opt.Factor = None,
    max_documents: opt.MaxDocuments = None,
    max_tokens: opt.MaxTokens = None,
    text_field: opt.TextField = _DEFAULT.text_field,
    split: opt.Split = _DEFAULT.split,
    batch_tokens: opt.BatchTokens = None,
    num_buckets: opt.NumBuckets = _DEFAULT.num_buckets,
    num_bootstrap: opt.NumBootstrap = _DEFAULT.num_bootstrap,
    memory: opt.Memory = None,
    segment: opt.SegmentLength = _DEFAULT.segment,
    num_places: Annotated[int, typer.Option(help="Places in each document (next-segment).")] = _DEFAULT.num_places,
    fail_over: Annotated[
        list[str] | None,
        typer.Option(help="LENGTH=PPL: exit with 1 where the perplexity is above it; may be repeated."),
    ] = None,
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
    """Measure perplexity at several context lengths: table, JSON and a picture.

    Example: longext eval ppl books-5m --method yarn --factor 8 --data sample --lengths 512,1024,2048,4096

    With a memory: longext eval ppl --memory out/uio@8 --data books/ --lengths 0,1024,4096
    """
    config = opt.config_with_memory(ctx, PerplexityConfig, recipe, settings, protocol=_NEXT_SEGMENT, lengths=())
    if config.protocol == _NEXT_SEGMENT:
        _run_next_segment(config, as_json)
    else:
        _run(dataclasses.replace(config, lengths=config.lengths or _DEFAULT.lengths), as_json)


def _run(config: PerplexityConfig, as_json: bool) -> None:
    from longext.cli.models import open_model
    from longext.data.documents import load_documents
    from longext.evals.limits import FAIL_OVER, require_bars
    from longext.evals.perplexity import (
        check_perplexity_config,
        evaluate_perplexity,
        num_forward_tokens,
        perplexity_bars,
        perplexity_record,
        perplexity_verdicts,
        tokenize_documents,
    )
    from longext.report.console import progress
    from longext.report.plots import nll_by_position, perplexity_by_length
    from longext.report.results import output_directory
    from longext.report.tables import named
    from longext.report.views import perplexity_table

    check_perplexity_config(config)
    bars = perplexity_bars(config)
    output = output_directory(config.output, f"ppl-{config.protocol}", config.model)
    open_output(output, config)
    documents = load_documents(config)
    model = open_model(config)
    tokenized, num_short = tokenize_documents(model, documents, config)
    with progress(f"ppl {config.protocol}", num_forward_tokens(tokenized, config), "tokens") as advance:
        results = evaluate_perplexity(model, tokenized, config, advance)
    record = perplexity_record(model, documents, tokenized, num_short, config, results)
    record["bars"] = perplexity_verdicts(bars, {row.length: row.ppl for row in results})
    name = opt.titled(config)
    draw = nll_by_position if config.protocol == "positional" else perplexity_by_length
    title = f"{name}: {record['protocol']['id']} on {named(config.data)}"
    deliver(
        output,
        "eval ppl",
        config,
        record,
        lambda: [perplexity_table(name, config.protocol, results)],
        lambda: {"ppl": draw({name: record["results"]}, trained=model.trained_length, title=title)},
        as_json=as_json,
        notes=[f"{num_short} document(s) shorter than the largest length were left out."] if num_short else [],
    )
    require_bars(record, FAIL_OVER)


def _run_next_segment(config: PerplexityConfig, as_json: bool) -> None:
    from longext.compressor.readers import load_reader
    from longext.data.documents import load_documents
    from longext.evals.limits import FAIL_OVER, require_bars
    from longext.evals.memory.controls import MEMORY
    from longext.evals.memory.next_segment import (
        check_memory_config,
        default_lengths,
        evaluate_memory,
        memory_record,
        num_scored_tokens,
        tokenize_for_memory,
    )
    from longext.evals.perplexity import perplexity_bars, perplexity_verdicts
    from longext.report.console import progress
    from longext.report.memory_views import memory_perplexity_figure, memory_perplexity_tables
    from longext.report.results import output_directory

    config = dataclasses.replace(config, lengths=config.lengths or default_lengths(config.segment))
    spec = check_memory_config(config)
    bars = perplexity_bars(config)
    output = output_directory(config.output, f"ppl-{config.protocol}", config.model)
    open_output(output, config)
    documents = load_documents(config)
    reader = load_reader(config, spec, segment=config.segment, method=config.method, factor=config.factor)
    tokenized, num_short = tokenize_for_memory(reader, documents, config)
    with progress(f"ppl {config.protocol}", num_scored_tokens(reader, tokenized, config), "tokens") as advance:
        results = evaluate_memory(
            reader,
            [document.input_ids for document in tokenized],
            config.lengths,
            config.num_places,
            config.seed,
            num_bootstrap=config.num_bootstrap,
            on_progress=advance,
        )
    record = memory_record(reader, documents, tokenized, num_short, config, results)
    record["bars"] = perplexity_verdicts(bars, {row.length: row.ppl for row in results if row.method == MEMORY})
    name = opt.titled(config)
    title = f"{name}: next segment of {config.segment} tokens"
    left = f"{num_short} document(s) shorter than the largest context and a segment were left out."
    deliver(
        output,
        "eval ppl",
        config,
        record,
        lambda: memory_perplexity_tables(name, results),
        lambda: {"ppl": memory_perplexity_figure(record["results"], title=title)},
        as_json=as_json,
        notes=[left] if num_short else [],
    )
    require_bars(record, FAIL_OVER)
