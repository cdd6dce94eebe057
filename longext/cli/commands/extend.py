"""Extend a checkpoint's context without training.

The weights are hard-linked, never loaded; the output is a standard checkpoint that plain transformers loads. Of a
.gguf, a new one is made for llama.cpp.

Example: longext extend books-5m --method yarn --factor 8

A GGUF file: longext extend MODEL.gguf --method ntk-by-parts --factor 4 -o OUT.gguf
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from longext.checkpoint.gguf import is_gguf
from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.conversion.config import ExtendConfig


def run(config: ExtendConfig, as_json: bool, dry_run: bool, verify: bool) -> None:
    """Plan, show old -> new, write, say what to do next."""
    if is_gguf(config.model):
        _run_gguf(dataclasses.replace(config, output=config.named_output), as_json, dry_run, verify)
        return
    from longext.cli.output import show
    from longext.conversion.engines import readers_note
    from longext.conversion.extend import extend_checkpoint, plan_extension, provenance
    from longext.conversion.files import left_out
    from longext.extras import install_line
    from longext.manifest import result_record
    from longext.report.commands.model import extension_table
    from longext.staging import hold_output

    config = dataclasses.replace(config, output=config.named_output)
    if not dry_run:
        hold_output(Path(config.named_output), config.force)
    plan = plan_extension(config) if dry_run else extend_checkpoint(config)
    notes = [*([] if dry_run else left_out(plan.source)), *(f"Warning: {line}" for line in plan.warnings)]
    notes.append(readers_note(plan.parameters))
    if not plan.is_checked:
        why = f"it is not installed: {install_line(['eval'])}" if config.check else "--no-check"
        notes.append(f"Not compared with what transformers builds ({why}): longext verify does it later.")
    wrote = f"Wrote {config.output}. Check it: longext verify {config.output}"
    notes.append("Dry run: nothing was written." if dry_run else wrote)
    record = result_record("extend", model=config.model, output=config.output, extension=provenance(plan))
    show(record, [extension_table(plan)], as_json=as_json, notes=notes)
    if verify and not dry_run:
        _verify(str(config.output), as_json)


def _run_gguf(config: ExtendConfig, as_json: bool, dry_run: bool, verify: bool) -> None:
    from longext.cli.output import show
    from longext.conversion.gguf.extend import check_gguf_output, extend_gguf, plan_gguf, provenance
    from longext.manifest import result_record
    from longext.report.commands.model import gguf_table
    from longext.report.console import progress

    plan = plan_gguf(config)
    if not dry_run:
        check_gguf_output(Path(config.named_output), config.force, plan.file.path)
        with progress(f"write {config.output}", plan.data_bytes, "bytes") as advance:
            extend_gguf(config, advance)
    wrote = f"Wrote {config.output}. Check it: longext verify {config.output}"
    notes = [*plan.notes, "Dry run: nothing was written." if dry_run else wrote]
    record = result_record("extend", model=config.model, output=config.output, extension=provenance(plan))
    show(record, [gguf_table(plan)], as_json=as_json, notes=notes)
    if verify and not dry_run:
        _verify(str(config.output), as_json)


def _verify(output: str, as_json: bool) -> None:
    from longext.cli.commands.verify import VerifyConfig, verify_and_show

    verify_and_show(VerifyConfig(model=output), as_json=False, aside=as_json)


SWITCHES = {"dry_run": "Print the plan and write nothing.", "verify": "Run `longext verify` on the output."}
COMMANDS.register("extend", Command(config=ExtendConfig, run=run, switches=SWITCHES))
