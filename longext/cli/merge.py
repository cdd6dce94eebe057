"""`longext merge`: an adapter into a standard checkpoint, proven before it appears."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longext.cli import app
from longext.cli.options import Force, Json, Output, Recipe, Settings, TrustRemoteCode, config_from
from longext.cli.output import open_output
from longext.conversion.config import MergeConfig
from longext.manifest import result_record

if TYPE_CHECKING:
    from longext.conversion.merge import MergeResult
    from longext.report.tables import Table

_EXAMPLE = """Merge a LoRA adapter (with trained embeddings and norms) into a standard checkpoint.

Computed in float32, written one tensor at a time; the RoPE the adapter was trained with goes into config.json. Then
logits(base + adapter) and logits(merged) are compared: the check loads the model in float32 (4 bytes a parameter),
twice, one after the other. Nothing appears under the output's name unless they agree.

Example: longext merge runs/books-4k -o out/books-4k-merged
"""


@app.command("merge", help=_EXAMPLE)
def merge(
    ctx: typer.Context,
    adapter: Annotated[
        str | None, typer.Argument(help="Adapter directory (adapter_config.json) or Hub id.", show_default=False)
    ] = None,
    output: Output = None,
    base: Annotated[str | None, typer.Option(help="The base model (default: the one the adapter names).")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of --base, for a Hub id.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (each tensor in the base's type), float32, bfloat16, float16.")
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the logits before the output appears.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    as_json: Json = False,
    recipe: Recipe = None,
    settings: Settings = None,
) -> None:
    """Plan, write, prove, show."""
    from longext.conversion.merge import plan_merge, write_merge
    from longext.report.console import print_table, progress, say, stdout
    from longext.report.results import dump_json

    config = config_from(ctx, MergeConfig, recipe, settings)
    if config.output is not None:
        open_output(Path(config.output), config)
    plan = plan_merge(config)
    with progress(f"merge {config.adapter}", plan.weight_bytes, "bytes") as advance:
        result = write_merge(plan, advance)
    if as_json:
        record = result_record("merge", output=config.output, **result.summary)
        stdout().out(dump_json({**record, "extension": result.merge.record}), highlight=False)
    else:
        print_table(merge_table(result))
    for note in result.merge.notes:
        say(note, aside=as_json)
    if result.proof is None:
        say("Not checked (--no-check): the logits were not compared with base + adapter.", aside=as_json)
    say(f"Wrote {config.output}. Check it: longext verify {config.output}", aside=as_json)


def merge_table(result: MergeResult) -> Table:
    """Return what was merged by kind, the RoPE old -> new, and the figures of the proof."""
    from longext.conversion.merge import describe_rope
    from longext.report.tables import Table

    record, summary = result.merge.record, result.summary
    rows = [
        *([kind, f"{tensors} tensors, {size:,} parameters"] for kind, (tensors, size) in result.counts.items()),
        ["output matrix", summary["output_matrix"]],
        ["stored as", ", ".join(summary["dtypes"])],
        ["rope before", describe_rope(record["old_rope_parameters"])],
        ["rope after", f"{describe_rope(record['rope_parameters'])} ({record['spec']['method']})"],
        ["context length", f"{record['old_length']:,} -> {record['new_length']:,}"],
        ["proof", result.proof.describe() if result.proof else "skipped (--no-check)"],
    ]
    title = f"{result.merge.config.adapter} merged into {record['base_model']}"
    return Table(title, ["", ""], rows, left=frozenset({1}))
