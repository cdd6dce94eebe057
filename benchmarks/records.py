"""The JSON record of a benchmark: the command, versions, device, threads, seed, and what was measured."""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from longext.manifest import versions

CLOCK = "CPU time of the process (user and system), so that what else the machine does counts little"


def add_output(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark take `-o FILE`."""
    parser.add_argument("-o", "--output", type=Path, help="write a JSON record to this file")


def command() -> str:
    """Return the command line of this benchmark."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def run_longext(*words: Any) -> float:
    """Run a command of longext on one thread; return the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    asked = [sys.executable, "-m", "longext", *map(str, words), "--threads", "1"]
    subprocess.run(asked, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_record(path: Path | None, **measured: Any) -> None:
    """Write how the numbers were made and the numbers to `path`, if there is one."""
    if path is None:
        return
    import torch

    on_gpu = torch.cuda.is_available()
    made = {
        "command": command(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made | measured, indent=1) + "\n", encoding="utf-8")


def now(device: str) -> float:
    """Return seconds: of wall time on a GPU once it is done, else of CPU time of this process (see `CLOCK`)."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
