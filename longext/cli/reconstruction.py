"""`longext eval reconstruction`: how much of a text comes back from its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.output import deliver, open_output
from longext.evals.config import ReconstructionConfig

_DEFAULT = ReconstructionConfig(model="")


@eval_app.command("reconstruction")
def reconstruction(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="COMPRESSOR", help="Directory of a trained compressor.", show_default=False)
    ] = None,
    data: opt.Data = _DEFAULT.data,
    ratio: Annotated[str | None, typer.Option(help="Ratios, comma-separated (default: those of training).")] = None,
    num_samples: Annotated[int, typer.Option(help="Segments to reconstruct, drawn at random.")] = _DEFAULT.num_samples,
    content: Annotated[
        str, typer.Option(help="Of text, shuffled (words) and random (tokens), comma-separated.")
    ] = opt.join(_DEFAULT.content),
    base: Annotated[str | None, typer.Option(help="The model it was trained on, where that has moved.")] = None,
    max_documents: opt.MaxDocuments = None,
    max_tokens: opt.MaxTokens = None,
    text_field: opt.TextField = _DEFAULT.text_field,
    split: opt.Split = _DEFAULT.split,
    batch_tokens: opt.BatchTokens = None,
    num_bootstrap: opt.NumBootstrap = _DEFAULT.num_bootstrap,
    device: opt.Device = _DEFAULT.device,
    dtype: opt.Dtype = _DEFAULT.dtype,
    attention: opt.Attention = None,
    seed: opt.Seed = _DEFAULT.seed,
    output: opt.Results = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Compress segments, decode them again from memory: BLEU-4, ROUGE-L, exact prefix, accuracy, bits saved.

    Example: longext eval reconstruction out/uio --data books/ --ratio 4,8,16 --content text,shuffled,random
    """
    _run(opt.config_from(ctx, ReconstructionConfig, recipe, settings), as_json)


def _run(config: ReconstructionConfig, as_json: bool) -> None:
    from longext.compressor.base import CompressorSpec
    from longext.compressor.checkpoint import load_compressor, read_description
    from longext.data.documents import load_documents
    from longext.evals.memory.reconstruction import (
        check_reconstruction_config,
        draw_segments,
        evaluate_reconstruction,
        ratio_notes,
        reconstruction_record,
    )
    from longext.report.console import progress
    from longext.report.reconstruction_views import reconstruction_by_ratio, reconstruction_tables
    from longext.report.results import output_directory

    description = read_description(Path(config.model).expanduser())
    spec = CompressorSpec.from_json(description["spec"])
    ratios = check_reconstruction_config(config, spec, description["window"])
    output = output_directory(config.output, "reconstruction", config.model)
    open_output(output, config)
    documents = load_documents(config)
    loaded = load_compressor(
        config.model, base=config.base, device=config.device, dtype=config.dtype, attention=config.attention
    )
    tokens = [loaded.plain.encode(document.text, add_bos=False)[: config.max_tokens] for document in documents]
    segments, available = draw_segments(tokens, spec.segment, config.num_samples, config.seed)
    total = len(segments) * len(ratios) * len(config.content)
    with progress("reconstruction", total, "segments") as advance:
        results = evaluate_reconstruction(loaded, segments, ratios, config, advance)
    record = reconstruction_record(loaded, documents, available, config, results)
    notes = ratio_notes(ratios, spec)
    if len(segments) < config.num_samples:
        notes.append(f"{config.data} has {available} segments of {spec.segment} tokens: all of them were used.")
    title = f"{config.model} ({spec.arch}, {spec.segment} tokens) on {config.data}"
    deliver(
        output,
        "eval reconstruction",
        config,
        record,
        lambda: reconstruction_tables(title, results),
        lambda: {"reconstruction": reconstruction_by_ratio(record["results"], title=f"Reconstruction by {title}")},
        as_json=as_json,
        notes=notes,
    )
