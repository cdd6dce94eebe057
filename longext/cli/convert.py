"""`longext convert`: an adapter's pickle files into safetensors, without running them."""

from __future__ import annotations

from typing import Annotated

import typer

from longext.cli import app
from longext.cli.options import Force, Json, Output, Recipe, Settings, config_from
from longext.conversion.config import ConvertConfig
from longext.manifest import result_record

_EXAMPLE = """Turn an adapter's pickle files into safetensors (adapter_model.bin, LongLoRA's trainable_params.bin).

They are read as tensors alone: a pickle that asks for anything else is refused, and nothing of it runs. The result is
an adapter directory as `finetune` writes one: `merge`, every evaluation and plain transformers take it.

Example: longext convert llama-2-7b-longlora-32k --base meta-llama/Llama-2-7b-hf --method linear --factor 8 -o adapter
"""


@app.command("convert", help=_EXAMPLE)
def convert(
    ctx: typer.Context,
    adapter: Annotated[str | None, typer.Argument(help="Adapter directory or Hub id.", show_default=False)] = None,
    method: Annotated[
        str | None, typer.Option(help="RoPE it was trained with: linear, ntk, yarn, ... or none (the base's own).")
    ] = None,
    factor: Annotated[float | None, typer.Option(help="Trained length of the adapter / that of the base.")] = None,
    target_length: Annotated[int | None, typer.Option(help="That length in tokens, instead of --factor.")] = None,
    output: Output = None,
    base: Annotated[str | None, typer.Option(help="The base model (default: the one the adapter names).")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of --base, for a Hub id.")] = None,
    force: Force = False,
    as_json: Json = False,
    recipe: Recipe = None,
    settings: Settings = None,
) -> None:
    """Read, check against the base, write, say what is next."""
    from longext.conversion.convert import conversion_record, convert_adapter
    from longext.report.console import say, stdout
    from longext.report.results import dump_json

    config = config_from(ctx, ConvertConfig, recipe, settings)
    result = convert_adapter(config)
    if as_json:
        record = result_record("convert", output=config.output, **conversion_record(result))
        stdout().out(dump_json(record), highlight=False)
    for note in result.notes:
        say(note, aside=as_json)
    say(
        f"Wrote {config.output}: {result.num_lora} LoRA tensors, {result.num_whole} whole ones, "
        f"{result.record['spec']['method']} RoPE. Next: longext merge {config.output} -o {config.output}-merged",
        aside=as_json,
    )
