"""The terminal: tables, progress with rate and ETA, plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich.console import Console

from longext.reporting.tables import Table

_PLAIN_SECONDS = 15.0  # without a terminal, one progress line at most this often

# names of files and models are printed as they are, whatever rich would read into them
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


def stdout() -> Console:
    """Return a console on standard output; wide enough for our tables where there is no terminal."""
    is_terminal = sys.stdout.isatty()
    return Console(width=None if is_terminal else 140, soft_wrap=not is_terminal, **_PLAIN)


def stderr() -> Console:
    """Return a console on standard error, for progress and messages."""
    return Console(stderr=True, soft_wrap=True, **_PLAIN)


def print_table(table: Table) -> None:
    """Print a table to standard output."""
    console = stdout()
    console.print(table.to_rich(mark="" if console.color_system else "*"))


def say(text: str, *, aside: bool = False) -> None:
    """Print one line to standard output (`aside`: to standard error, where JSON has the other)."""
    (stderr() if aside else stdout()).print(text)


class Advance(Protocol):
    """Tell a progress display that `amount` more is done; `note` is shown beside it."""

    def __call__(self, amount: int, note: str = "") -> None: ...


def tokenising(what: str) -> Callable[[int], None]:
    """Return tell(tokens so far): a line on standard error now and then, since nobody knows how many there will be."""
    last = time.perf_counter()

    def tell(tokens: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= _PLAIN_SECONDS / 3:
            last = now
            stderr().print(f"tokenising {what}: {tokens:,} tokens so far")

    return tell


@contextlib.contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Advance]:
    """Yield advance(n, note): a rich bar with rate and ETA on a terminal, a plain line now and then elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield _plain_progress(what, total, unit)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, rate="", note="")

        def advance(amount: int, note: str = "") -> None:
            done = bar.tasks[0].completed + amount
            rate = f"{done / (time.perf_counter() - started):,.0f} {unit}/s"
            bar.update(task, advance=amount, rate=rate, note=note)

        yield advance


def _plain_progress(what: str, total: int, unit: str) -> Advance:
    started = last = time.perf_counter()
    done = 0

    def advance(amount: int, note: str = "") -> None:
        nonlocal last, done
        done += amount
        now = time.perf_counter()
        if now - last < _PLAIN_SECONDS:
            return
        last = now
        rate = max(done, 1) / (now - started)
        left = (total - done) / rate
        tail = f"; {note}" if note else ""
        print(
            f"{what}: {done:,}/{total:,} {unit} ({done / total:.0%}), {rate:,.0f} {unit}/s, {left:.0f} s left{tail}",
            file=sys.stderr,
            flush=True,
        )

    return advance
