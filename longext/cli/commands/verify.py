"""Check a checkpoint against its formula and its base.

It is reloaded with plain transformers in a fresh process; its frequencies, logits and weights are compared. Exits 1
and names the culprit key on a mismatch. Of a .gguf: keys, frequencies and weights, and whether llama.cpp reads them.

With --endpoint: which RoPE does the server apply? Its log-probabilities of a text are compared with those of the
checkpoint, here, under each RoPE that servers are known to take for it.

Example: longext verify out/books-5m-4k

A server: longext verify out/books-5m-4k --endpoint http://localhost:8000/v1
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.errors import VerificationError
from longext.options import EndpointConfig, RuntimeConfig
from longext.settings import MANY, option, override

if TYPE_CHECKING:
    from longext.conversion.verify import Verification


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(EndpointConfig):
    """`longext verify`: a checkpoint against its formula and its base, or a server against the checkpoint."""

    model: str = option(help="The checkpoint, or the .gguf file, to check.", argument=True)
    base: str | None = option(None, "The model it was made from (default: what its run.json names).")
    logits: bool = option(True, "Load the weights and compare logits.")
    hashes: bool = option(True, "Compare every weight with the base.")
    concurrency: int = override(EndpointConfig, "concurrency", 1, is_flag=False)  # one text is asked for
    revision: str | None = override(RuntimeConfig, "revision", is_flag=False)
    trust_remote_code: bool = override(RuntimeConfig, "trust_remote_code", is_flag=False)
    factor: float | None = option(
        None, "Factor that the server may apply (default: the checkpoint's).", ge=1, le=MANY, panel="Server"
    )
    length: int | None = option(
        None, "Tokens of the text that is compared (default: 1.25 x the trained length).", ge=2, panel="Server"
    )


def verify_and_show(config: VerifyConfig, as_json: bool, aside: bool = False) -> None:
    """Verify, print the checks, and raise VerificationError if one failed.

    Args:
        aside: print the outcome alone, on standard error: another command's JSON has standard output.
    """
    from longext.cli.output import show
    from longext.manifest import result_record
    from longext.report.commands.model import verification_table
    from longext.report.console import say

    result = _verified(config)
    failed = [check for check in result.checks if check.status == "fail"]
    skipped = [check.name for check in result.checks if check.status == "skip"]
    limits = f", as far as checked: {', '.join(skipped)} skipped." if skipped else "."
    record = result_record("verify", ok=result.ok, **dataclasses.asdict(result))
    outcome = [] if failed or as_json else [f"{config.model} is what it says{limits}"]
    if config.endpoint:
        verdict = f"{config.endpoint} applies {result.checks[0].detail}."
        say(verdict, aside=as_json)
        outcome = []
    if aside:
        show(record, [], as_json=False, warnings=outcome)
    else:
        show(record, [verification_table(result)], as_json=as_json, notes=outcome)
    if failed:
        of = config.endpoint or config.model
        raise VerificationError(f"{of} failed {len(failed)} check(s): {failed[0].name}: {failed[0].detail}")


def _verified(config: VerifyConfig) -> Verification:
    from longext.checkpoint.gguf import is_gguf, read_gguf
    from longext.checkpoint.source import resolve_model
    from longext.checkpoint.weights import read_shards
    from longext.conversion.gguf.verify import verify_gguf
    from longext.conversion.verify import verify_checkpoint
    from longext.report.console import progress

    if config.endpoint:
        from longext.models.endpoint.scaling import NUM_TRIED, verify_endpoint

        with progress(f"verify {config.endpoint}", NUM_TRIED, "RoPEs") as advance:
            return verify_endpoint(config, advance)
    if is_gguf(config.model):
        file = read_gguf(Path(config.model).expanduser())
        verify, total = verify_gguf, file.data_end - file.data_start
    else:
        verify, total = verify_checkpoint, sum(shard.size for shard in read_shards(resolve_model(config.model)))
    settings = {name: getattr(config, name) for name in ("base", "logits", "hashes")}
    with progress(f"verify {config.model}", total, "bytes") as advance:
        return verify(config.model, **settings, on_progress=advance)


COMMANDS.register("verify", Command(config=VerifyConfig, run=verify_and_show))
