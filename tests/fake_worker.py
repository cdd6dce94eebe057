"""A worker without torch for tests of the launcher: `fake_worker WHAT_RANK_0_DOES WHAT_RANK_1_DOES`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from longext.processes.launcher import follow_launcher, may_report, process_rank


def stop(number, _):
    """What training does after its step: one line, the shell's exit code."""
    may_report(f"stopped by {signal.Signals(number).name}", 128 + number, everywhere=True)
    sys.exit(128 + number)


def main():
    follow_launcher()
    rank = process_rank()
    what, _, detail = sys.argv[1 + rank].partition(":")
    handlers = {"stops": stop, "ends well": lambda *_: sys.exit(0), "deaf": lambda *_: None}
    if what in handlers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handlers[what])
    print(f"rank {rank} here", flush=True)
    Path(f"{rank}.pid.part").write_text(str(os.getpid()))
    Path(f"{rank}.pid.part").rename(f"{rank}.pid")
    if what == "fails":
        may_report(f"rank {rank} has bad data", int(detail))
        sys.exit(int(detail))
    if what == "crashes":
        raise RuntimeError("unforeseen")
    if what == "dies":
        os.kill(os.getpid(), int(detail))
    if what == "loses a peer":
        time.sleep(0.3)
        may_report("another process ended", 1)
        sys.exit(1)
    end = time.monotonic() + (0 if what == "ok" else 60)
    while time.monotonic() < end:
        time.sleep(0.02)


main()
