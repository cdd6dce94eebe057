"""Whether a mean reaches a limit, decided while its values come in; may be looked at after every one of them.

The values are all prompts of a plan, drawn in random order and without replacement, so that the verdict after the last
of them is certain. Before that it is given once it is wrong in at most a stated share of runs: by a bet against the
opposite, whose stake then grows above 1 / error in at most that share of runs (Ville, 1939; for means without
replacement: Waudby-Smith and Ramdas, arXiv 2006.04347).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longext.evals.statistics import paired_interval

LOOKS = (3, 6, 12, 24, 48, 96, 192)  # values after which a mean without bounds is looked at: each look costs confidence
_BETS = 24  # means that are bet on, evenly spaced above the one that is bet against
_EXACT = 1e-9  # of sums of shares: rounding


def stakes(values: Any, total: int, most: float) -> NDArray[np.float64]:
    """Return what a stake of 1 becomes, bet against "the mean of all `total` values is at most `most`".

    The stake is spread over larger means, and each is bet on by its likelihood ratio: values are right (1) or wrong
    (0), or shares between them, for which the same bet is fair. If the claim holds, the stake is ever k or more in at
    most 1 / k of all orders of the values.

    Args:
        values: 0 to 1, float64 [..., n], in the order in which they are drawn, n <= total.

    Returns:
        float64 [..., n]: after each value.
    """
    values = np.asarray(values, dtype=np.float64)
    before = np.cumsum(values, -1) - values
    left = total - np.arange(values.shape[-1])
    claimed = (total * most - before) / left  # what the mean of the values left is at most, if the claim holds
    is_refuted = (claimed < -_EXACT) | ((claimed <= _EXACT) & (values > _EXACT))
    is_open = (claimed > _EXACT) & (claimed < 1 - _EXACT)
    safe = np.where(is_open, claimed, 0.5)
    means = (most + (1 - most) * np.arange(1, _BETS + 1) / _BETS).reshape(-1, *(1,) * values.ndim)
    bet = np.clip((total * means - before) / left, 0, 1)
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.where(is_open, values * bet / safe + (1 - values) * (1 - bet) / (1 - safe), 1)
        logs = np.log(factor)
        won = np.exp(np.cumsum(logs, -1)).mean(0)
    return np.where(np.logical_or.accumulate(is_refuted, -1), math.inf, won)


def decide(
    values: Any, limit: float, total: int, pass_error: float, fail_error: float, grain: float = 0
) -> NDArray[np.int8]:
    """Return whether the mean of `total` values is at least `limit`, as far as it is certain after each of them.

    Args:
        values: 0 to 1, float64 [..., n], in random order.
        pass_error: share of runs in which a mean below the limit may pass before all values are in; 0: none.
        fail_error: share of runs in which a mean that reaches the limit may fail.
        grain: all values are multiples of it; 0 if that is not known.

    Returns:
        int8 [..., n]: 1 it is, 0 it is not, -1 not certain yet; the first that is not -1 is the verdict.
    """
    values = np.asarray(values, dtype=np.float64)
    below = enough = limit
    if grain:  # the nearest means that there can be
        steps = math.ceil(limit * total / grain - _EXACT)
        below, enough = (steps - 1) * grain / total, steps * grain / total
    needed, least = limit * total - _EXACT, np.cumsum(values, -1)
    left = total - 1 - np.arange(values.shape[-1])
    passes, fails = least >= needed, least + left < needed  # no value left can change it
    with np.errstate(invalid="ignore"):  # infinity times 0
        passes |= stakes(values, total, below) * pass_error >= 1
        fails |= stakes(1 - values, total, 1 - enough) * fail_error >= 1
    return np.where(passes, 1, np.where(fails, 0, -1)).astype(np.int8)


class MeanTest:
    """The verdict on whether the mean of `total` values is at least `limit`, as they come in; see `decide`."""

    def __init__(self, limit: float, total: int, pass_error: float, fail_error: float, grain: float = 0) -> None:
        self.total = total
        self.verdict: bool | None = None
        self.values: list[float] = []
        self._decide = partial(
            decide, limit=limit, total=total, pass_error=pass_error, fail_error=fail_error, grain=grain
        )

    @property
    def mean(self) -> float | None:
        """The mean of the values until the verdict."""
        return float(np.mean(self.values)) if self.values else None

    def add(self, values: Sequence[float]) -> bool | None:
        """Take more values, and return the verdict, None if there is none yet; once there is one, it stays."""
        if self.verdict is None and values:
            self.values += values
            codes = self._decide(self.values)
            if (codes >= 0).any():
                first = int(np.argmax(codes >= 0))
                self.verdict, self.values = bool(codes[first]), self.values[: first + 1]
        return self.verdict


def planned_interval(values: Sequence[float], total: int, error: float = 0.05) -> tuple[float, float]:
    """Return the interval of the mean of all `total` values after the first of them, valid whenever one stopped.

    Args:
        values: those that are in, 0 to 1, in the random order in which they came.
        error: share of runs in which the interval misses the mean; 0: only what is impossible is left out.
    """
    return _lowest(values, total, error / 2), 1 - _lowest([1 - value for value in values], total, error / 2)


def _lowest(values: Sequence[float], total: int, error: float) -> float:
    """Return the least mean that is not refuted, to 1e-4."""
    low = sum(values) / total  # if all that is left were 0
    high = sum(values) / len(values)
    while error and high - low > 1e-4:
        middle = (low + high) / 2
        is_refuted = stakes(values, total, middle)[-1] * error >= 1
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


class LookTest:
    """Whether the mean of `total` values without bounds is at most 0, looked at after `LOOKS` of them.

    By Student's t with the errors divided by the number of looks, so for values whose means are nearly normal, as
    differences of the losses of windows are. The values are drawn without replacement; the last one decides.
    """

    def __init__(self, total: int, pass_error: float, fail_error: float) -> None:
        self.total = total
        self.verdict: bool | None = None
        self.values: list[float] = []
        self._errors = pass_error, fail_error
        self._looks = sum(look < total for look in LOOKS)

    @property
    def mean(self) -> float | None:
        """The mean of the values until the verdict."""
        return float(np.mean(self.values)) if self.values else None

    def interval(self, error: float) -> tuple[float, float]:
        """Return the bounds of the mean of all values, each wrong in at most that share of runs."""
        middle, count = float(np.mean(self.values)), len(self.values)
        if count == self.total:
            return middle, middle
        if count < LOOKS[0] or not error:
            return -math.inf, math.inf
        low, high = paired_interval(self.values, 0.025 * max(1, self._looks) / error)
        shrunk = math.sqrt(1 - count / self.total)  # only what is left to draw is open
        return middle - shrunk * (middle - low), middle + shrunk * (high - middle)

    def add(self, value: float) -> bool | None:
        """Take one more value, and return the verdict, None if there is none yet; once there is one, it stays."""
        if self.verdict is None:
            self.values.append(value)
            count = len(self.values)
            if count == self.total:
                self.verdict = float(np.mean(self.values)) <= 0
            elif count in LOOKS and min(self._errors) > 0:
                passing, failing = (self.interval(error) for error in self._errors)
                self.verdict = True if passing[1] <= 0 else False if failing[0] > 0 else None
        return self.verdict
