"""The signals that end a command: SIGINT (Ctrl-C), SIGTERM (a scheduler's warning), SIGHUP (the terminal is gone)."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
_received: list[int] = []


def heeded() -> list[int]:
    """Return the signals that may end this process: those it was started to ignore (nohup, `&` in a script) stay so."""
    known = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def received() -> int | None:
    """Return the first signal that came since `ending_signals` was entered, None where none did."""
    return _received[0] if _received else None


def raise_if_received() -> None:
    """Raise KeyboardInterrupt where a signal came whose exception somebody swallowed (a thread, native code)."""
    if _received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Let each of the signals raise KeyboardInterrupt, so that whatever cleans up after Ctrl-C does so after all three.

    One that comes while another is dealt with is ignored, but for a second Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    before = {number: signal.signal(number, _interrupt) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _interrupt(number: int, _: Any) -> None:
    is_first = not _received
    _received.append(number)
    if is_first or number == signal.SIGINT:
        raise KeyboardInterrupt
