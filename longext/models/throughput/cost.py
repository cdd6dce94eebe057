"""What an evaluation will cost: tokens to read and to write, seconds on this device after a probe, money."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longext.models.throughput.pace import Load, Pace, measured_pace
from longext.models.throughput.prefixes import PrefixReader, is_worth_it, sharing_order
from longext.processes.launcher import num_processes


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What there is to do, and how long it takes here.

    Attributes:
        num_read_tokens: of all prompts.
        num_shared_tokens: of these, in a prefix that another prompt has too: they are read once.
        num_new_tokens: written at most.
        num_at_once: answers that are written together.
        seconds: at most, if every answer has its whole budget, shared evenly by the processes of the run; None if there
            is too little to do for a probe.
        usd: at a price for an hour of one device; None without one, or without seconds.
        is_most: what is done first decides what comes next, and it may be less.
    """

    num_prompts: int
    num_read_tokens: int
    num_shared_tokens: int
    num_new_tokens: int
    num_at_once: int
    seconds: float | None
    usd: float | None
    is_most: bool = False

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both; seconds and money of those that have them."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        known = {key: [value for value in (mine[key], theirs[key]) if value is not None] for key in mine}
        total: dict[str, Any] = {key: sum(values) if values else None for key, values in known.items()}
        return Cost(**{**total, **{key: max(mine[key], theirs[key]) for key in ("num_at_once", "is_most")}})


def expected_cost(model: Any, load: Load, price_per_hour: float | None, shares: bool = True) -> Cost:
    """Return what a load costs on a model; measures its pace if that was not done and is worth it.

    Args:
        shares: prefixes that prompts have in common are read once, where the model allows.
    """
    order, kept = sharing_order(load.prompts) if shares else ([], [])
    if not is_worth_it(load.prompts, kept) or PrefixReader.of(model) is None:
        order, kept = list(range(len(load.prompts))), [0] * len(load.prompts)
    pace = measured_pace(model, load)
    busy = None if pace is None else _seconds(pace, load, order, kept)  # of all devices together
    return Cost(
        num_prompts=len(load.prompts),
        num_read_tokens=load.num_tokens,
        num_shared_tokens=sum(kept),
        num_new_tokens=load.num_new,
        num_at_once=pace.rows if pace and load.num_new else 1,
        seconds=None if busy is None else busy / min(num_processes(), len(load.prompts)),
        usd=None if busy is None or price_per_hour is None else busy / 3600 * price_per_hour,
    )


def _seconds(pace: Pace, load: Load, order: Sequence[int], kept: Sequence[int]) -> float:
    reading = sum(pace.reading(len(load.prompts[i]), known) for i, known in zip(order, kept, strict=True))
    return reading + pace.writing(load.num_new, len(load.prompts))


class Bill:
    """Adds up what the parts of an evaluation will cost, and tells it before they begin.

    Args:
        tell: called with the cost of each part.
        price_per_hour: USD for an hour of this device.
    """

    def __init__(self, tell: Callable[[Cost], object] = lambda cost: None, price_per_hour: float | None = None) -> None:
        self._tell, self._price = tell, price_per_hour
        self.total: Cost | None = None

    def expect(self, model: Any, prompts: Sequence[Sequence[int]], num_new: int, shares: bool = True) -> None:
        """Take what will be done next into account; see `expected_cost`."""
        if prompts:
            self._add(expected_cost(model, Load(prompts=prompts, num_new=num_new), self._price, shares))

    def expect_at_most(self, model: Any, parts: Iterable[Sequence[Sequence[int]]]) -> None:
        """Take the prompts of several parts into account, the largest first; nothing is written."""
        costs = (expected_cost(model, Load(prompts=each, num_new=0), self._price) for each in parts)
        self._add(dataclasses.replace(functools.reduce(operator.add, costs), is_most=True))

    def _add(self, cost: Cost) -> None:
        self._tell(cost)
        self.total = cost if self.total is None else self.total + cost

    def facts(self) -> dict[str, Any]:
        """Return what a record says: {"cost": ...}, nothing if nothing was expected."""
        if self.total is None:
            return {}
        told = dataclasses.asdict(self.total)
        return {"cost": told if self.total.is_most else {key: told[key] for key in told if key != "is_most"}}
