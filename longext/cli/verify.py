"""`longext verify`: prove that a checkpoint is what it says."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from longext.cli import app
from longext.cli.options import Json
from longext.errors import VerificationError
from longext.manifest import result_record


@app.command("verify")
def verify(
    model: Annotated[str, typer.Argument(help="The checkpoint to check.")],
    base: Annotated[
        str | None, typer.Option(help="The model it was made from (default: what its run.json names).")
    ] = None,
    logits: Annotated[bool, typer.Option("--logits/--no-logits", help="Load the weights and compare logits.")] = True,
    hashes: Annotated[bool, typer.Option("--hashes/--no-hashes", help="Compare every weight with the base.")] = True,
    as_json: Json = False,
) -> None:
    """Reload a checkpoint with plain transformers in a fresh process and compare it with its formula and its base.

    Exits 1 and names the culprit key on a mismatch. Example: longext verify out/books-5m-4k
    """
    run_verification(model, base, logits=logits, hashes=hashes, as_json=as_json)


def run_verification(model: str, base: str | None, *, logits: bool, hashes: bool, as_json: bool) -> None:
    """Verify, print the checks, and raise VerificationError where one failed."""
    from longext.checkpoint.source import read_shards, resolve_model
    from longext.conversion.verify import verify_checkpoint
    from longext.report.console import print_table, progress, say, stdout
    from longext.report.results import dump_json
    from longext.report.views import verification_table

    total = sum(shard.size for shard in read_shards(resolve_model(model)))
    with progress(f"verify {model}", total, "bytes") as advance:
        result = verify_checkpoint(model, base, logits=logits, hashes=hashes, on_progress=advance)
    if as_json:
        record = result_record("verify", ok=result.ok, **dataclasses.asdict(result))
        stdout().out(dump_json(record), highlight=False)
    else:
        print_table(verification_table(result))
    failed = [check for check in result.checks if check.status == "fail"]
    if failed:
        raise VerificationError(f"{model} failed {len(failed)} check(s): {failed[0].name}: {failed[0].detail}")
    skipped = [check.name for check in result.checks if check.status == "skip"]
    if not as_json:
        say(f"{model} is what it says" + (f", as far as checked: {', '.join(skipped)} skipped." if skipped else "."))
