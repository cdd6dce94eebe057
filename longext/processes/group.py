"""The processes of a run: joining them, waiting for one another, and being of one mind."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from longext.errors import DisagreementError
from longext.processes.launcher import (
    is_launched,
    is_main_process,
    is_sharded,
    launch,
    local_rank,
    num_processes,
    process_rank,
)

__all__ = ["is_launched", "is_main_process", "is_sharded", "launch", "local_rank", "num_processes", "process_rank"]
_turns = itertools.count()  # of the main process; every process counts the same
_LOOK_SECONDS = 0.2


def start_distributed(device: torch.device, timeout: int = 1800) -> None:
    """Join the other processes (NCCL on CUDA devices, gloo elsewhere); nothing for a run of one.

    Args:
        timeout: seconds after which a process that does not answer the others ends the run.
    """
    if num_processes() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))


def forget_half_a_launch() -> None:
    """Outside a launch, take away what is set of its variables: accelerate takes LOCAL_RANK alone for one."""
    if not is_launched():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block first, and the others wait for it, as long as it takes: it may tokenise.

    They look at the store through which the processes met: a collective has a time limit, and cannot be interrupted.
    """
    store, turn = None, f"longext/main-process-first/{next(_turns)}"
    if num_processes() > 1 and dist.is_initialized():
        store = meeting_place()
    if store is not None and not is_main_process():
        while not store.check([turn]):
            time.sleep(_LOOK_SECONDS)
    yield
    if store is not None and is_main_process():
        store.set(turn, "done")


@functools.cache
def meeting_place() -> Any:
    """Return a connection to the store that torch.distributed.init_process_group and torchrun use."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]


def gather(value: Any) -> list[Any]:
    """Return what every process gives, in the order of ranks; it must pickle."""
    if not dist.is_initialized():
        return [value]
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, value)
    return answers


def agree(facts: Mapping[str, Any]) -> None:
    """Compare what the processes of a run have found before they start.

    Raises:
        DisagreementError: in every process, naming the first fact that is not the same in all.
    """
    answers = gather((socket.gethostname(), dict(facts)))
    for rank, (host, theirs) in enumerate(answers):
        for key, value in answers[0][1].items():
            if theirs.get(key) != value:
                raise DisagreementError(
                    f"The processes of this run disagree: {key} is {value} in process 0 on {answers[0][0]} and "
                    f"{theirs.get(key)} in process {rank} on {host}. Every machine needs the same command, model and "
                    "data, and to --resume the same -o directory with its checkpoints (a shared disk, or a copy)."
                )


def sum_gradients(module: torch.nn.Module) -> None:
    """Add up every trained parameter's gradient over all processes."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # all ranks must take part in every all-reduce
            dist.all_reduce(parameter.grad)
