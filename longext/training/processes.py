"""The processes of a run: launching them, and who is who among them."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from longext.errors import LAUNCHED_BY_US, ConfigError


class DirectoryInUse(ConfigError):
    """Another process trains in a run's working directory."""


def num_processes() -> int:
    """Return the number of processes of this run (torchrun's WORLD_SIZE, else 1)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True in the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def is_launched() -> bool:
    """True inside a process that torchrun or accelerate started."""
    return "LOCAL_RANK" in os.environ


def is_sharded() -> bool:
    """True where accelerate's configuration divides the weights (FSDP, DeepSpeed) instead of copying them."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def start_distributed(device: torch.device) -> None:
    """Join the other processes (NCCL on CUDA devices, gloo elsewhere); nothing for a run of one."""
    if num_processes() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # others wait while one process tokenises, which may take hours
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def hold_directory(directory: Path) -> Any:
    """Lock a run's working directory for as long as the returned file is open (on systems that have flock).

    Raises:
        DirectoryInUse: another process trains there.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = (directory / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DirectoryInUse(
            f"Another process is at work in {directory}. Wait for it or stop it, then use --resume."
        ) from None
    return file


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `longext ARGUMENTS` in `processes` processes on this machine through torchrun; return the exit code.

    Signals go to the workers themselves: torchrun would give them 30 seconds, and a step may take longer. One that
    comes before there are workers ends torchrun.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, LAUNCHED_BY_US: "1"}
    child = subprocess.Popen([*command, "-m", "longext", *arguments], env=environment, start_new_session=True)
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = psutil.Process(child.pid).children()
            for process in workers or [child]:
                process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    code = child.wait()
    return 128 + received[0] if received else code
