"""Merge a LoRA adapter into a standard checkpoint.

Embeddings and norms that were trained with it are merged too. Computed in float32, written one tensor at a time; the
RoPE the adapter was trained with goes into config.json. Then logits(base + adapter) and logits(merged) are compared:
the check loads the model in float32 (4 bytes a parameter), twice, one after the other. Nothing appears under the
output's name unless they agree.

Example: longext merge runs/books-4k -o out/books-4k-merged
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.conversion.config import MergeConfig

if TYPE_CHECKING:
    from longext.conversion.merge import MergeResult
    from longext.report.tables import Table


def run(config: MergeConfig, as_json: bool) -> None:
    """Plan, write, prove, show."""
    from longext.cli.output import open_output, show
    from longext.conversion.merge import plan_merge, write_merge
    from longext.manifest import result_record
    from longext.report.console import progress

    if config.output is not None:
        open_output(Path(config.output), config)
    plan = plan_merge(config)
    with progress(f"merge {config.adapter}", plan.extension.weight_bytes, "bytes") as advance:
        result = write_merge(plan, advance)
    record = result_record("merge", output=config.output, **result.summary, extension=result.merge.record)
    unchecked = "Not checked (--no-check): the logits were not compared with base + adapter."
    wrote = f"Wrote {config.output}. Check it: longext verify {config.output}"
    notes = [*result.merge.notes, *([unchecked] if result.proof is None else []), wrote]
    show(record, [merge_table(result)], as_json=as_json, notes=notes)


def merge_table(result: MergeResult) -> Table:
    """Return what was merged by kind, the RoPE old -> new, and the figures of the proof."""
    from longext.conversion.card import describe_rope
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


COMMANDS.register("merge", Command(config=MergeConfig, run=run, needs=("output",), extras=("train",)))
