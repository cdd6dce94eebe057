"""The processes of a run on this machine: started, watched and ended together, and who failed first.

Nothing here needs torch. A worker is `python -m longext ...` with the variables torch.distributed reads (RANK,
WORLD_SIZE, ...), as under torchrun. The first worker that fails leaves its message and exit code in a file that only
one can create; the launcher prints the one and returns the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longext.errors import LAUNCHED_BY_US
from longext.signals import end_with_parent, handling

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILURES = "LONGEXT_FAILURES"  # the folder of a job of ours in which the first failure is kept
_FAILURE = "longext-failure.json"
_RESUME = "Go on from the last checkpoint, if there is one, with --resume."
_POLL_SECONDS = 0.05
_ECHO_SECONDS = 0.2  # `timeout` signals a process and then its group: one wish, not two


# --- in a worker ------------------------------------------------------------------------------------------------------


def is_launched() -> bool:
    """True inside a process that torchrun, accelerate or `--num-processes` started: all their variables are there."""
    return all(name in os.environ for name in _VARIABLES)


def num_processes() -> int:
    """Return the number of processes of this run (1 outside a launch)."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def process_rank() -> int:
    """Return this process's number in the run."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """Return this process's number on its machine, which is also that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def is_main_process() -> bool:
    """True in the process that writes and prints."""
    return process_rank() == 0


def is_sharded() -> bool:
    """True if accelerate's configuration divides the weights (FSDP, DeepSpeed) instead of copying them."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def is_shrunk_launch() -> bool:
    """True if `accelerate launch` was asked for several processes and started one: what it does on a CPU.

    It then names a place to meet (MASTER_ADDR) and gives no rank. FSDP is dropped as well.
    """
    return "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and not is_launched()


def missing_variables() -> list[str]:
    """Return what lacks of the variables of a launch if RANK and WORLD_SIZE say that there are several processes."""
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return [name for name in _VARIABLES if several and name not in os.environ]


def follow_launcher() -> None:
    """In a worker, end when what launched it is gone; elsewhere do nothing."""
    launcher = os.environ.get(LAUNCHED_BY_US, "")
    if launcher.isdecimal():
        end_with_parent(int(launcher))
    elif is_launched():
        end_with_parent()


def may_report(message: str, code: int, everywhere: bool = False) -> bool:
    """True if this process prints its failure: the first to fail of those that were launched together.

    Workers of `launch` leave the printing to it. Under torchrun the first on each machine speaks.

    Args:
        everywhere: all processes fail with these words at once: without a launcher of ours the main one speaks.
    """
    folder = _failure_folder()
    if not is_launched() or folder is None:
        return is_main_process() or not everywhere
    if everywhere and _FAILURES not in os.environ:
        return is_main_process()
    try:
        with (folder / _FAILURE).open("x", encoding="utf-8") as file:
            json.dump({"message": message, "code": code, "rank": process_rank()}, file)
    except FileExistsError:
        return False
    except OSError:
        return True
    return _FAILURES not in os.environ


def _failure_folder() -> Path | None:
    if _FAILURES in os.environ:
        return Path(os.environ[_FAILURES])
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/LOCAL_RANK/error.json, removed by torchrun
    return Path(file).parent.parent if file else None


# --- the launcher -----------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """The workers of a launch, and what has happened to them.

    Attributes:
        workers: one process each, the leader of a session of its own: a terminal's Ctrl-C reaches the launcher alone.
        folder: where the first failure and what ranks above 0 print are kept.
        grace: seconds from a signal to the end by force.
        settle: seconds to end without being asked once another has failed, and from SIGTERM to SIGKILL.
        advice: how the user goes on after a process was killed.
        signals: those the launcher got, with the time.
        plan: what will be sent to the workers that are left, and when.
        ended: {rank: exit code} of those that had failed when the first failure was seen.
        forced: workers were killed because the grace was over, or the user asked twice.
    """

    workers: list[subprocess.Popen[bytes]]
    folder: Path
    grace: float
    settle: float
    advice: str
    signals: list[tuple[int, float]] = field(default_factory=list)
    plan: list[tuple[float, int]] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)
    forced: bool = False

    @property
    def asked(self) -> int | None:
        """The first signal that asked the job to end."""
        return self.signals[0][0] if self.signals else None

    def note(self, number: int, _: Any) -> None:
        """Remember a signal; the loop acts on it."""
        now = time.monotonic()
        if not self.signals or now - self.signals[-1][1] > _ECHO_SECONDS:
            self.signals.append((number, now))

    def send(self, number: int) -> None:
        """Signal the workers that are left; SIGKILL their children too, and wake up those that were stopped."""
        for worker in self.workers:
            if worker.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if number == signal.SIGKILL else os.kill)(worker.pid, number)
                    worker.send_signal(signal.SIGCONT)


def launch(
    processes: int,
    arguments: Sequence[str],
    *,
    grace: float = 600.0,
    settle: float = 5.0,
    advice: str = _RESUME,
    module: str = "longext",
) -> int:
    """Run `python -m MODULE ARGUMENTS` in `processes` processes on this machine; return the job's exit code.

    A first signal is passed on, and the workers get `grace` seconds to save and stop; then they are sent SIGTERM and,
    `settle` seconds later, SIGKILL. A second signal kills them at once. When one fails, the others are ended. Workers
    die with this process, however it ends.

    Args:
        advice: how the user goes on after a process was killed.
    """
    with tempfile.TemporaryDirectory(prefix="longext-launch-") as folder:
        job = _Job([], Path(folder), grace, settle, advice)
        with handling(job.note):
            try:
                _start(job, processes, arguments, module)
                _wait(job)
            finally:
                job.send(signal.SIGKILL)
        return _report(job, debug=not {"--debug", "--traceback"}.isdisjoint(arguments))


def _start(job: _Job, processes: int, arguments: Sequence[str], module: str) -> None:
    common = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # or every process tells of a peer that ended, by the page
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        LAUNCHED_BY_US: str(os.getpid()),
        _FAILURES: str(job.folder),
    }
    for rank in range(processes):
        if job.signals:
            return
        log = (job.folder / f"{rank}.log").open("wb") if rank else contextlib.nullcontext()
        with log as output:
            worker = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        job.workers.append(worker)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(job: _Job) -> None:
    """Return when every worker has ended."""
    handled = 0
    while any([worker.poll() is None for worker in job.workers]):  # all of them are asked
        now = time.monotonic()
        if len(job.signals) > handled:
            handled = len(job.signals)
            _obey(job, now)
        _look_for_failure(job, now)
        while job.plan and job.plan[0][0] <= now:
            number = job.plan.pop(0)[1]
            job.forced = job.forced or (number == signal.SIGKILL and not job.ended)
            job.send(number)
        time.sleep(_POLL_SECONDS)
    _look_for_failure(job, time.monotonic())


def _obey(job: _Job, now: float) -> None:
    """Pass a first signal on and plan the end by force; at a second one the end is now."""
    if len(job.signals) == 1:
        job.send(job.signals[0][0])
        job.plan = [(now + job.grace, signal.SIGTERM), (now + job.grace + job.settle, signal.SIGKILL)]
    else:
        job.plan = [(now, signal.SIGKILL)]


def _look_for_failure(job: _Job, now: float) -> None:
    """Note who failed first, and plan the end of the others."""
    expected = {None, 0} if job.asked is None else {None, 0, 128 + job.asked, -job.asked}
    if job.ended or job.forced:
        return
    codes = {rank: worker.poll() for rank, worker in enumerate(job.workers)}
    job.ended = {rank: code for rank, code in codes.items() if code not in expected and code is not None}
    if job.ended:
        job.plan = [(now + job.settle, signal.SIGTERM), (now + 2 * job.settle, signal.SIGKILL)]


def _report(job: _Job, debug: bool) -> int:
    """Print what went wrong in one line and return the exit code."""
    code, message = _outcome(job)
    if message:
        if debug:
            for log in sorted(job.folder.glob("*.log")):
                sys.stderr.write(log.read_text(encoding="utf-8", errors="replace"))
        print(f"longext: {message}", file=sys.stderr)
    return code


def _outcome(job: _Job) -> tuple[int, str]:
    """Return (exit code, one line) of a job that has ended; the line is empty for one that ended well."""
    try:
        failure = json.loads((job.folder / _FAILURE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        failure = {}
    size, resume = len(job.workers), job.advice
    if job.asked is not None and not job.ended:
        code, name = 128 + job.asked, signal.Signals(job.asked).name
        if job.forced:
            return code, f"the processes of this run did not end after {name} and were killed. {resume}"
        if size and not any(worker.returncode for worker in job.workers):
            return 0, ""  # it came when the work was done
        return code, failure.get("message", f"interrupted by {name}; nothing unfinished was left under an output name.")
    killed = {rank: -code for rank, code in job.ended.items() if code < 0}
    if killed:
        rank, number = next(iter(killed.items()))
        why = " (killed for want of memory?)" if number == signal.SIGKILL else ""
        return 1, f"process {rank} of {size} was ended by {signal.Signals(number).name}{why}. {resume}"
    if failure:
        return int(failure["code"]), str(failure["message"])
    for rank, code in job.ended.items():
        return code, f"process {rank} of {size} ended with exit code {code}{_last_words(job, rank)}"
    return 0, ""


def _last_words(job: _Job, rank: int) -> str:
    log = job.folder / f"{rank}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return f": {said[-1]}" if said else "."
