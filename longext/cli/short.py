"""`longext eval short`: what a model loses on short texts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.models import open_model
from longext.cli.output import deliver, open_output
from longext.evals.config import ShortConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longext.evals.perplexity import PerplexityAtLength
    from longext.evals.short_context import ShortWindows
    from longext.models.protocol import LanguageModel

_DEFAULT = ShortConfig(model="")


@eval_app.command("short")
def short(
    ctx: typer.Context,
    model: opt.Model = None,
    against: Annotated[
        str | None, typer.Option(help="The model it was made from (default with --memory or --method: MODEL itself).")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest relative increase of perplexity that passes.")
    ] = _DEFAULT.tolerance,
    data: opt.Data = _DEFAULT.data,
    lengths: Annotated[
        str | None, typer.Option(help="Window lengths, comma-separated (default: the trained length, and half of it).")
    ] = None,
    num_windows: Annotated[
        int, typer.Option(help="Windows of the largest length read of each document.")
    ] = _DEFAULT.num_windows,
    method: opt.Method = None,
    factor: opt.Factor = None,
    max_documents: opt.MaxDocuments = None,
    max_tokens: opt.MaxTokens = None,
    text_field: opt.TextField = _DEFAULT.text_field,
    split: opt.Split = _DEFAULT.split,
    batch_tokens: opt.BatchTokens = None,
    num_bootstrap: opt.NumBootstrap = _DEFAULT.num_bootstrap,
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
    """Guard short texts: perplexity within the trained length against the base, on the same tokens.

    Exits with 1 where the measured increase is above --tolerance at any length; the interval is for judging it.

    Example: longext eval short out/llama2-32k --against meta-llama/Llama-2-7b-hf --data books/
    """
    _run(opt.config_with_memory(ctx, ShortConfig, recipe, settings), as_json)


def _run(config: ShortConfig, as_json: bool) -> None:
    from longext.checkpoint.source import resolve_model
    from longext.data.documents import load_documents
    from longext.errors import ConfigError, LongextError
    from longext.evals.short_context import (
        check_short_config,
        compare_short,
        cut_windows,
        lengths_within,
        short_record,
    )
    from longext.report.check_views import short_notes, short_table
    from longext.report.results import output_directory

    check_short_config(config)
    output = output_directory(config.output, "short", config.model)
    open_output(output, config)
    resolve_model(config.model, config.revision)  # a wrong name is told before the base is run
    documents = load_documents(config)
    reference = _reference(config)
    base = open_model(reference)
    lengths = lengths_within(config, base.trained_length)
    cuts = cut_windows(base, documents, lengths, config)
    base_rows, base_facts = _score(base, cuts, config, "the base"), base.describe()
    del base  # the two need not fit beside each other
    model = open_model(config)
    if cut_windows(model, documents, lengths, config) != cuts:
        raise ConfigError(
            f"{config.model} and {reference.model} split this text into different tokens: their perplexities are not "
            "of the same thing."
        )
    rows = _score(model, cuts, config, "the model")
    results = compare_short(rows, base_rows, cuts, config)
    record = short_record(model.describe(), base_facts, documents, config, results)
    deliver(
        output,
        "eval short",
        config,
        record,
        lambda: [short_table(opt.titled(config), reference.model, results)],
        dict,
        as_json=as_json,
        notes=short_notes(record),
    )
    if not record["passed"]:
        raise LongextError(record["verdict"])


def _reference(config: ShortConfig) -> ShortConfig:
    """Return the config of the base: the model alone, with no method and no memory."""
    revision = None if config.against else config.revision
    model = config.against or config.model
    return dataclasses.replace(config, model=model, revision=revision, method=None, factor=None, memory=None)


def _score(
    model: LanguageModel, cuts: Sequence[ShortWindows], config: ShortConfig, what: str
) -> list[PerplexityAtLength]:
    from longext.evals.short_context import num_short_tokens, score_short
    from longext.report.console import progress

    with progress(f"short texts, {what}", num_short_tokens(cuts), "tokens") as advance:
        return score_short(model, cuts, config, advance)
