"""How the processes of an evaluation start, and what each of them may do: one writes and prints, all measure."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from longext.cli.output import open_output
from longext.errors import ConfigError
from longext.processes.dealing import sharing
from longext.processes.launcher import (
    is_launched,
    is_main_process,
    launch,
    local_rank,
    missing_variables,
    num_processes,
)
from longext.staging import release_outputs

_GRACE = 60.0  # seconds to stop in after a signal: what is done is on the disk already
GO_ON = "The same command goes on from the answers so far, if there are any."


@contextlib.contextmanager
def together(config: Any, output: Path) -> Iterator[Path]:
    """Yield the output directory in each process that measures, of which the main one holds it; see `sharing`.

    With `--num-processes` above 1 the block is not run here: processes are started that run the same command, and this
    one ends with their exit code. Under torchrun the processes are there.

    Raises:
        ConfigError: the output cannot be written, or these settings cannot be shared.
    """
    if missing_variables():
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, and {', '.join(missing_variables())} not: the processes of a run need all "
            "that torchrun sets. Start with torchrun, or unset them for a run of one process."
        )
    wanted = num_processes() if is_launched() else config.num_processes
    if wanted > 1 and config.device == "map":
        raise ConfigError("--device map lays one model over all GPUs: give it to one process (--num-processes 1).")
    if is_main_process():
        open_output(output, config)
    if wanted > 1 and not is_launched():
        release_outputs()  # to the main one of the processes
        raise typer.Exit(launch(wanted, sys.argv[1:], grace=_GRACE, advice=GO_ON))
    output = _join(config, output) if wanted > 1 else output
    with sharing(scores_path(output)):
        yield output


def scores_path(output: Path) -> Path:
    """Return the file that keeps scores until the results are written."""
    return output.with_name(f"{output.name}.scores.jsonl")


def _join(config: Any, output: Path) -> Path:
    """Join the other processes, each with a GPU of its own if there are any; return the main one's output."""
    import torch

    from longext.processes.group import gather, start_distributed

    if torch.cuda.is_available() and config.device in ("auto", "cuda"):
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    start_distributed(torch.device("cpu"))  # what is exchanged are results, not tensors
    found: Path = gather(output)[0]
    return found
