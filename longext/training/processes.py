"""The processes of a run: launching them, and who is who among them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist


def num_processes() -> int:
    """Return the number of processes of this run (torchrun's WORLD_SIZE, else 1)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True in the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def is_launched() -> bool:
    """True inside a process that torchrun or accelerate started."""
    return "LOCAL_RANK" in os.environ


def start_distributed() -> None:
    """Join the other processes (NCCL on CUDA devices, gloo elsewhere); nothing for a run of one."""
    if num_processes() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `longext ARGUMENTS` in `processes` processes on this machine through torchrun; return its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    return subprocess.call([*command, "-m", "longext", *arguments], env=environment)
