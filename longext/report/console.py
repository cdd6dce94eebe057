"""The terminal: tables, progress with rate and ETA, plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich.console import Console

from longext.report.tables import Table

_PLAIN_SECONDS = 15.0  # without a terminal, one progress line at most this often

# names of files and models are printed as they are, whatever rich would read into them
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


def stdout() -> Console:
    """Return a console on standard output; wide enough for our tables where there is no terminal."""
    is_terminal = sys.stdout.isatty()
    columns = os.environ.get("COLUMNS", "")
    width = None if is_terminal else int(columns) if columns.isdecimal() and int(columns) else 140
    return Console(width=width, soft_wrap=not is_terminal, **_PLAIN)


def stderr() -> Console:
    """Return a console on standard error, for progress and messages."""
    return Console(stderr=True, soft_wrap=True, **_PLAIN)


def print_table(table: Table) -> None:
    """Print a table to standard output."""
    console = stdout()
    for part in table.parts(console.width):
        console.print(part.to_rich(mark="" if console.color_system else "*"))


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


def pace(done: int, total: int, unit: str, seconds: float) -> str:
    """Return how fast something goes and how long it still takes; nothing is guessed before anything is done."""
    if not done or seconds <= 0:
        return f"{duration(seconds)} so far"
    rate = done / seconds
    told = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    return f"{told} {unit}/s, {duration((total - done) * seconds / done)} left"


def duration(seconds: float) -> str:
    """Return a time as people say it: 42 s, 3 min 5 s, 2 h 40 min, 5 d 3 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


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
        tail = f"; {note}" if note else ""
        share = f"{done:,}/{total:,} {unit} ({done / max(total, 1):.0%})"
        print(f"{what}: {share}, {pace(done, total, unit, now - started)}{tail}", file=sys.stderr, flush=True)

    return advance
