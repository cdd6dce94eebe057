"""The terminal: tables, progress with rate and ETA, plain lines if there is no terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from longext.evals.base import Advance
from longext.processes.launcher import num_processes
from longext.report.tables import Table

if TYPE_CHECKING:
    from longext.models.throughput.cost import Cost

_PLAIN_SECONDS = 15.0  # without a terminal, one progress line at most this often

# names of files and models are printed as they are, whatever rich would read into them
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


def stdout() -> Console:
    """Return a console on standard output; wide enough for our tables if there is no terminal."""
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
    """Print one line to standard output (`aside`: to standard error, if JSON has the other)."""
    (stderr() if aside else stdout()).print(text)


def say_cost(cost: Cost) -> None:
    """Print what a run reads and writes, its seconds on this device and its price, to standard error."""
    shared = f" ({cost.num_shared_tokens:,} shared, read once)" if cost.num_shared_tokens else ""
    new = f", at most {cost.num_new_tokens:,} to write" if cost.num_new_tokens else ""
    most = "at most " if cost.is_most else ""
    say(f"{most}{cost.num_prompts:,} texts: {cost.num_read_tokens:,} tokens to read{shared}{new}", aside=True)
    if cost.seconds is not None:
        together = f", {cost.num_at_once} answers at once" if cost.num_at_once > 1 else ""
        price = "" if cost.usd is None else f", {cost.usd:,.2g} USD"
        most = "at most about" if cost.num_new_tokens or cost.is_most else "about"
        where = "this device" if num_processes() == 1 else f"{num_processes()} devices"
        say(f"{most} {duration(cost.seconds)} on {where}{together}{price}", aside=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show that something goes on whose length is not known; yields tell(text), which says what it is at.

    A spinner on a terminal; elsewhere a line now and then.
    """
    console = stderr()
    if console.is_terminal:
        with console.status(Text(what)) as status:
            yield lambda text: status.update(Text(text))
        return
    last = time.perf_counter()

    def tell(text: str) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= _PLAIN_SECONDS / 3:
            last = now
            print(text, file=sys.stderr, flush=True)

    silent = threading.Timer(_PLAIN_SECONDS, print, (f"{what} ...",), {"file": sys.stderr, "flush": True})
    silent.daemon = True
    silent.start()
    try:
        yield tell
    finally:
        silent.cancel()


class _Clock:
    """How fast work goes, from its first step on: what comes before it (loading, a resumed part) counts for nothing."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self.done, self._uncounted = 0, 0
        self._started: float | None = None

    def advance(self, amount: int) -> None:
        """Count `amount` more; the first of them starts the clock."""
        self.done += amount
        if self._started is None and amount:
            self._started, self._uncounted = time.perf_counter(), self.done

    def pace(self) -> str:
        """Return rate and remaining time, an empty text while they are not known."""
        seconds = 0.0 if self._started is None else time.perf_counter() - self._started
        return pace(self.done - self._uncounted, self.total - self._uncounted, self.unit, seconds)


@contextlib.contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Advance]:
    """Yield advance(n, note): a rich bar with rate and ETA on a terminal, a plain line now and then elsewhere."""
    console, clock = stderr(), _Clock(total, unit)
    if not console.is_terminal:
        yield _plain_progress(what, clock)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    fields = ("{task.percentage:>3.0f}%", "{task.fields[pace]}", "{task.fields[note]}")
    share, pace_text, note_text = (TextColumn(field, markup=False) for field in fields)
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), share, TimeElapsedColumn(), pace_text, note_text)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, pace="", note="")

        def advance(amount: int, note: str = "") -> None:
            clock.advance(amount)
            bar.update(task, advance=amount, pace=clock.pace(), note=note)

        yield advance


def pace(done: int, total: int, unit: str, seconds: float) -> str:
    """Return how fast something goes and how long it still takes; nothing is guessed before anything is done."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    spelled = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    return f"{spelled} {unit}/s, {duration((total - done) * seconds / done)} left"


def duration(seconds: float) -> str:
    """Return a time as people read it: 350 ms, 42 s, 0:03:05 (hours, minutes, seconds), 5 d 3:00:00."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms" if seconds else "0 s"
    if seconds < 59.5:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    days, rest = divmod(round(seconds), 86_400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock


def _plain_progress(what: str, clock: _Clock) -> Advance:
    last = time.perf_counter()

    def advance(amount: int, note: str = "") -> None:
        nonlocal last
        clock.advance(amount)
        now = time.perf_counter()
        if now - last < _PLAIN_SECONDS:
            return
        last = now
        share = f"{clock.done:,}/{clock.total:,} {clock.unit} ({clock.done / max(clock.total, 1):.0%})"
        tail = "; ".join(text for text in (clock.pace(), note) if text)
        print(f"{what}: {share}{', ' if tail else ''}{tail}", file=sys.stderr, flush=True)

    return advance
