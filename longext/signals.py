"""Signals: handlers that leave an ignored signal ignored, and processes that end with the one that started them.

Commands clean up after all of `STOPS` as after Ctrl-C: each raises KeyboardInterrupt. A training handles them itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# What asks a command to end: a scheduler's warning, Ctrl-C, a terminal that goes away.
STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_WATCH_SECONDS = 1.0


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None], numbers: Sequence[int] = STOPS) -> Iterator[None]:
    """Handle these signals by `handler(number, frame)` and put the former handlers back on leaving.

    A signal that is ignored (SIGHUP under nohup, SIGINT of a background job) stays ignored. Python allows handlers
    in the main thread alone: in another one nothing is changed.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
        before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


_received: list[int] = []


def received() -> int | None:
    """Return the first signal that came since `ending_signals` was entered, None if none did."""
    return _received[0] if _received else None


def raise_if_received() -> None:
    """Raise KeyboardInterrupt if a signal came whose exception somebody swallowed (a thread, native code)."""
    if _received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Let each of `STOPS` raise KeyboardInterrupt, so that whatever cleans up after Ctrl-C does so after all of them.

    One that comes while another is dealt with is ignored, but for a second Ctrl-C.
    """
    _received.clear()
    try:
        with handling(_interrupt):
            yield
    finally:
        if _received:
            # A KeyboardInterrupt that leaves exec("...") (of a library) makes Python end by SIGINT under -m, whatever
            # the exit code, unless another exec ends well: SIGTERM would look like Ctrl-C.
            exec("")
        _received.clear()


def _interrupt(number: int, _: Any) -> None:
    is_first = not _received
    _received.append(number)
    if is_first or number == signal.SIGINT:
        raise KeyboardInterrupt


def end_with_parent(parent: int | None = None) -> None:
    """End this process, without a word, when the process that started it is gone.

    A thread looks for it every second: it works under any launcher, and while the main thread waits in a library.

    Args:
        parent: the process that started this one. If given, Linux is told to kill this process with it too, which works
            even while this process is stopped. It must have been started from that process's main thread: Linux
            looks at the thread.
    """
    if parent is not None and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    first = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == first:
            time.sleep(_WATCH_SECONDS)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, name="longext-watch-parent", daemon=True).start()
