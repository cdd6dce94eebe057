"""How many CPU threads torch uses: as asked, else the cores that nobody else is using."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # what torch has followed already


def set_threads(threads: int | None, otherwise: int | None = None) -> int:
    """Make torch use `threads` CPU threads in this process, and return how many it uses now.

    None leaves what the environment asks for (OMP_NUM_THREADS), else takes `free_cores`: threads that wait for a busy
    core at every barrier make a model slower than one thread does (measured: two on a busy machine of two cores, ten
    times).

    Args:
        otherwise: instead of the free cores.
    """
    if threads is None and not any(name in os.environ for name in _ENVIRONMENT):
        threads = otherwise or free_cores()
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def free_cores() -> int:
    """Return the cores that this process may run on and others leave free, at least one."""
    machine = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return max(1, round(cores - _busy() * cores / machine))


def _busy() -> float:
    """Return how many others want a core: now and in the last minute, whose load may be that of our last command."""
    try:
        load, _, _, running, *_ = Path("/proc/loadavg").read_text(encoding="ascii").split()
        return min(float(load), int(running.partition("/")[0]) - 1.0)
    except (OSError, ValueError):  # no Linux: nothing is known
        return 0.0
