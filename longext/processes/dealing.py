"""Work of an evaluation: dealt to the processes of a run, kept as it is done, put together in every process.

A process takes the next batch that nobody has taken, longest first where the caller sorts so; which batches there are
depends on the whole work alone, so the results do not depend on how many processes share it.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from longext.processes.launcher import is_main_process, num_processes, process_rank

Row = dict[str, Any]  # what is known of one item of the work
_LOOK_SECONDS = 0.05


class Keeper(Protocol):
    """Where rows are kept while a run lasts."""

    def read(self) -> dict[str, Row]:
        """Return what earlier runs have kept, by the name of the item."""
        ...

    def add(self, rows: Mapping[str, Row]) -> None:
        """Keep rows by the names of their items."""
        ...


@dataclass
class Share:
    """How the work of a command is shared, and where its scores are kept.

    Attributes:
        scores: file of the scores of a run that lasts; None: they are not kept.
        known: what was read of it, by its path.
    """

    scores: Path | None = None
    known: dict[Path, Any] = field(default_factory=dict)

    def agreed(self, value: Any) -> Any:
        """Return what the main process has."""
        return value

    def united(self, rows: dict[Any, Row]) -> dict[Any, Row]:
        """Return the rows of all processes."""
        return rows

    def turns(self, batches: Sequence[Any]) -> Iterator[Any]:
        """Yield the batches that this process is to do."""
        yield from batches

    def count(self, amount: int) -> int:
        """Return how much more all processes have done since the last call, `amount` of it in this one just now."""
        return amount


class SharedByProcesses(Share):
    """Shared with the other processes of this run, through the store that they met at."""

    _turn = 0
    _seen = 0

    def agreed(self, value: Any) -> Any:
        """Return what the main process has."""
        from longext.processes.group import gather

        return gather(value if is_main_process() else None)[0]

    def united(self, rows: dict[Any, Row]) -> dict[Any, Row]:
        """Return the rows of all processes, once all of them are here."""
        from longext.processes.group import gather

        return {key: row for part in gather(rows) for key, row in part.items()}

    def turns(self, batches: Sequence[Any]) -> Iterator[Any]:
        """Yield the batches that this process takes; end when all processes have done theirs."""
        from longext.processes.group import meeting_place

        self._turn = next(_turns)
        self._seen = 0
        store, name = meeting_place(), f"longext/deal/{self._turn}"
        while (number := store.add(f"{name}/taken", 1) - 1) < len(batches):
            yield batches[number]
        store.add(f"{name}/ended", 1)
        # a collective has a time limit and cannot be interrupted: the others may be at a long batch
        while store.add(f"{name}/ended", 0) < num_processes():
            time.sleep(_LOOK_SECONDS)

    def count(self, amount: int) -> int:
        """Return how much more all processes have done since the last call, `amount` of it in this one just now."""
        from longext.processes.group import meeting_place

        total: int = meeting_place().add(f"longext/deal/{self._turn}/done", amount)
        new, self._seen = total - self._seen, total
        return new


_NOT_SHARED = Share()
_turns = itertools.count(1)  # of the works of this process; every process counts the same
_share: ContextVar[Share] = ContextVar("share")


@contextlib.contextmanager
def sharing(scores: Path | None = None) -> Iterator[None]:
    """Share the work of the block among the processes of this run, which have joined, and keep scores in a file."""
    kind = SharedByProcesses if num_processes() > 1 else Share
    token = _share.set(kind(scores))
    try:
        yield
    finally:
        _share.reset(token)


def share() -> Share:
    """Return how the work that is going on is shared: not at all outside `sharing`."""
    return _share.get(_NOT_SHARED)


def own_file(path: Path) -> Path:
    """Return the file of this process beside the main one's `path`."""
    rank = process_rank() if isinstance(share(), SharedByProcesses) else 0
    return path.with_name(f"{path.stem}.process{rank}{path.suffix}") if rank else path


def files_of_all(path: Path) -> list[Path]:
    """Return `path` and the files beside it that other processes wrote, those that there are."""
    begin = f"{path.stem}.process"
    others = [
        other
        for other in (path.parent.iterdir() if path.parent.is_dir() else ())
        if other.name.startswith(begin) and other.suffix == path.suffix and other.stem[len(begin) :].isdecimal()
    ]
    return [file for file in (path, *sorted(others)) if file.is_file()]


def workers_of(model: Any) -> int:
    """Return how many threads may ask a model at once: 1, unless a server runs it."""
    return int(getattr(model, "workers", 1))


def deal(
    names: Sequence[str],
    batches: Sequence[Sequence[int]],
    answer: Callable[[Sequence[int]], Sequence[Row]],
    *,
    keeper: Keeper | None = None,
    on_progress: Callable[[int], object] | None = None,
    weights: Sequence[int] | None = None,
    workers: int = 1,
) -> list[Row]:
    """Return the row of every item of a work, the same in every process that shares it.

    A batch with an item that is not known is done whole: batches do not depend on what a run before has done.

    Args:
        names: of the items; with a keeper different for different items, in whatever run.
        batches: of item numbers; those of the main process count.
        answer: batch -> the row of each of its items.
        keeper: where rows are kept and looked up.
        on_progress: called with the weight of the items just done, those found first.
        weights: of the items; 1 each by default.
        workers: threads that call `answer`, for answers that are waited for.
    """
    shared = share()
    wanted = set(names)
    kept = shared.united({name: row for name, row in keeper.read().items() if name in wanted} if keeper else {})
    rows = {number: kept[name] for number, name in enumerate(names) if name in kept}

    def tell(amount: int) -> None:
        if on_progress and amount:
            on_progress(amount)

    def weigh(numbers: Sequence[int]) -> int:
        return len(numbers) if weights is None else sum(weights[number] for number in numbers)

    tell(weigh(list(rows)))
    plan: list[list[int]] = shared.agreed([list(batch) for batch in batches])
    new: dict[int, Row] = {}
    turns = shared.turns([batch for batch in plan if not all(number in rows for number in batch)])
    for batch, answers in _answered(turns, answer, workers):
        done = {number: row for number, row in zip(batch, answers, strict=True) if number not in rows}
        if keeper:
            keeper.add({names[number]: row for number, row in done.items()})
        new |= done
        tell(shared.count(weigh(list(done))))
    tell(shared.count(0))
    rows |= shared.united(new)
    return [rows[number] for number in range(len(names))]


def _answered(
    batches: Iterator[list[int]], answer: Callable[[Sequence[int]], Sequence[Row]], workers: int
) -> Iterator[tuple[list[int], Sequence[Row]]]:
    """Yield each batch with its rows, as they come.

    Threads do not outlive this process: who interrupts it waits for no answer.
    """
    if workers == 1:
        yield from ((batch, answer(batch)) for batch in batches)
        return
    todo: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[list[int], Sequence[Row] | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        while (batch := todo.get()) is not None:
            try:
                done.put((batch, answer(batch)))
            except BaseException as error:  # raised again where it is waited for
                done.put((batch, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    open_batches = 0
    try:
        while True:
            for batch in itertools.islice(batches, workers - open_batches):
                todo.put(batch)
                open_batches += 1
            if not open_batches:
                return
            batch, rows = done.get()
            open_batches -= 1
            if isinstance(rows, BaseException):
                raise rows
            yield batch, rows
    finally:
        for _ in threads:
            todo.put(None)
