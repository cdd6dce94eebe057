"""Write a checkpoint in another format: a .gguf file for llama.cpp.

Llama, Qwen2 and Qwen3 checkpoints with byte-level BPE, with the RoPE that `extend` gave them.

Example: longext export gguf books-5m -o books-5m.gguf
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.conversion.config import ExportConfig


def run(config: ExportConfig, as_json: bool) -> None:
    """Plan, write, say what is next."""
    from longext.cli.output import show
    from longext.conversion.engines import gguf_note
    from longext.conversion.gguf.export import export_gguf, plan_export
    from longext.conversion.gguf.extend import check_gguf_output
    from longext.manifest import result_record
    from longext.report.console import progress

    config = dataclasses.replace(config, output=config.named_output)
    plan = plan_export(config)
    check_gguf_output(Path(config.named_output), config.force, plan.source)
    with progress(f"write {config.output}", plan.num_bytes, "bytes") as advance:
        export_gguf(config, advance)
    rope = dataclasses.asdict(plan.spec)
    record = result_record(
        "export", model=config.model, output=config.output, architecture=plan.architecture, rope=rope
    )
    wrote = f"Wrote {config.output} ({len(plan.tensors)} tensors, {plan.spec.method} RoPE). Check it: longext verify "
    show(record, [], as_json=as_json, notes=[gguf_note(), wrote + str(config.output)])


COMMANDS.register("export", Command(config=ExportConfig, run=run))
