"""Check a checkpoint against its formula and its base.

It is reloaded with plain transformers in a fresh process; its frequencies, logits and weights are compared. Exits 1
and names the culprit key on a mismatch. Of a .gguf: keys, frequencies and weights, and whether llama.cpp reads them.

Example: longext verify out/books-5m-4k

What a server really applies: longext verify out/books-5m-4k --endpoint http://localhost:8000
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.errors import VerificationError
from longext.options import EndpointConfig
from longext.settings import option, override


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(EndpointConfig):
    """`longext verify`: a checkpoint against its formula and its base."""

    model: str = option(help="The checkpoint, or the .gguf file, to check.", argument=True)
    base: str | None = option(None, "The model it was made from (default: what its run.json names).")
    logits: bool = option(True, "Load the weights and compare logits.")
    hashes: bool = option(True, "Compare every weight with the base.")
    endpoint: str | None = override(
        EndpointConfig,
        "endpoint",
        help="Ask a server that serves the model (OpenAI's completions API) which RoPE it applies.",
    )
    concurrency: int = override(EndpointConfig, "concurrency", 1, is_flag=False)


def verify_and_show(config: VerifyConfig, as_json: bool, aside: bool = False) -> None:
    """Verify, print the checks, and raise VerificationError if one failed.

    Args:
        aside: print the outcome alone, on standard error: another command's JSON has standard output.
    """
    from longext.checkpoint.gguf import is_gguf, read_gguf
    from longext.checkpoint.source import resolve_model
    from longext.checkpoint.weights import read_shards
    from longext.cli.output import show
    from longext.conversion.gguf.verify import verify_gguf
    from longext.conversion.verify import verify_checkpoint
    from longext.manifest import result_record
    from longext.report.commands.model import verification_table
    from longext.report.console import progress

    if config.endpoint is not None:
        _ask_endpoint(config, as_json)
        return
    if is_gguf(config.model):
        file = read_gguf(Path(config.model).expanduser())
        verify, total = verify_gguf, file.data_end - file.data_start
    else:
        verify, total = verify_checkpoint, sum(shard.size for shard in read_shards(resolve_model(config.model)))
    settings = {"logits": config.logits, "hashes": config.hashes}
    with progress(f"verify {config.model}", total, "bytes") as advance:
        result = verify(config.model, config.base, **settings, on_progress=advance)
    failed = [check for check in result.checks if check.status == "fail"]
    skipped = [check.name for check in result.checks if check.status == "skip"]
    limits = f", as far as checked: {', '.join(skipped)} skipped." if skipped else "."
    record = result_record("verify", ok=result.ok, **dataclasses.asdict(result))
    outcome = [] if failed or as_json else [f"{config.model} is what it says{limits}"]
    if aside:
        show(record, [], as_json=False, warnings=outcome)
    else:
        show(record, [verification_table(result)], as_json=as_json, notes=outcome)
    if failed:
        raise VerificationError(f"{config.model} failed {len(failed)} check(s): {failed[0].name}: {failed[0].detail}")


def _ask_endpoint(config: VerifyConfig, as_json: bool) -> None:
    from longext.cli.output import show
    from longext.manifest import result_record
    from longext.models.engines.served_rope import verify_endpoint
    from longext.options import RuntimeConfig
    from longext.report.commands.model import endpoint_table

    answer = verify_endpoint(RuntimeConfig(model=config.model), config)
    found = answer.found
    applied = "none of those tried, or one of two that are alike" if found is None else found.name
    record = result_record("verify-endpoint", ok=answer.ok, found=found and found.name, **dataclasses.asdict(answer))
    notes = [f"The server applies: {applied}."] if answer.ok and not as_json else []
    show(record, [endpoint_table(answer)], as_json=as_json, notes=notes)
    if not answer.ok:
        raise VerificationError(
            f"{config.endpoint} applies {applied}; the config of {config.model} says {answer.expected.name}."
        )


COMMANDS.register("verify", Command(config=VerifyConfig, run=verify_and_show))
