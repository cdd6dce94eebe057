"""Limits that a result must reach, in one form for every evaluation: `--fail-under NAME=SCORE`.

A name is what an evaluation measures: a task, a length, or a task at a length (TASK@LENGTH). A record holds its limits
with what was measured (under "bars"); a command that missed one exits with 1, once its results are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longext.errors import ConfigError, LongextError
from longext.registry import did_you_mean

FAIL_UNDER, FAIL_OVER = "--fail-under", "--fail-over"
ALL = "all"  # the name of a limit on everything
PLACES = "SCORE, TASK=SCORE, LENGTH=SCORE or TASK@LENGTH=SCORE"  # the form of evaluations with tasks and lengths
Place = tuple[str, str]  # task ("" for an evaluation without tasks), length as users spell it


@dataclass(frozen=True)
class Scale:
    """The values that a limit can have: `least` to `most`, in `words`."""

    words: str
    least: float
    most: float


SHARE = Scale("a share of 0 to 1 (0.9 for 90%)", 0, 1)
POINTS = Scale("a score of 0 to 100", 0, 100)
POSITIVE = Scale("a score of 0 or more", 0, math.inf)
PERPLEXITY = Scale("a perplexity of 1 or more", 1, math.inf)


@dataclass(frozen=True)
class PlaceLimit:
    """A limit of the score at a task and a length, None for all of them."""

    name: str
    task: str | None
    length: str | None
    limit: float


def read_limits(
    given: Sequence[str], *, form: str, scale: Scale, option: str = FAIL_UNDER, has_whole: bool = False
) -> dict[str, float]:
    """Return name -> limit from NAME=NUMBER; "" is the name of a number alone.

    Args:
        form: what the option takes, for messages.
        scale: the numbers that can be.
        has_whole: a number may stand alone.

    Raises:
        ConfigError: not of that form, out of range, or a name given twice.
    """
    limits: dict[str, float] = {}
    for item in given:
        name, equals, text = item.rpartition("=")
        name = name.strip()
        if name in limits:
            raise ConfigError(f"{option} names {name or ALL} twice.")
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = math.nan
        has_name = bool(name) or (has_whole and not equals)
        if not (has_name and math.isfinite(limits[name]) and scale.least <= limits[name] <= scale.most):
            raise ConfigError(f"{option} takes {form} with {scale.words}, got '{item}'.")
    return limits


def check_names(limits: Mapping[str, float], names: Iterable[str], option: str = FAIL_UNDER) -> None:
    """Raise ConfigError for a name that is none of `names`."""
    known = list(names)
    for name in limits:
        if name not in known:
            raise ConfigError(f"{option} {name}: unknown task '{name}'. {did_you_mean(name, known)}")


def place_limits(
    given: Sequence[str],
    places: Iterable[Place],
    *,
    form: str = PLACES,
    scale: Scale = SHARE,
    option: str = FAIL_UNDER,
    has_whole: bool = True,
) -> list[PlaceLimit]:
    """Return limits named TASK, LENGTH or TASK@LENGTH, or by nothing for all prompts together.

    Args:
        places: every task and length that is measured.

    Raises:
        ConfigError: as `read_limits`; or a task or length that is not measured.
    """
    measured = list(dict.fromkeys(places))
    limits = read_limits(given, form=form, scale=scale, option=option, has_whole=has_whole)
    return [PlaceLimit(name or ALL, *_find(name, measured, option), limit) for name, limit in limits.items()]


def perplexity_limits(given: Sequence[str], lengths: Iterable[int], form: str = "LENGTH=PPL") -> list[PlaceLimit]:
    """Return the limits of --fail-over at lengths that are measured."""
    places = [("", str(length)) for length in sorted(lengths)]
    return place_limits(given, places, form=form, scale=PERPLEXITY, option=FAIL_OVER, has_whole=False)


def _find(name: str, places: Sequence[Place], option: str) -> tuple[str | None, str | None]:
    """Return (task, length) of a name, None for what it leaves open."""
    tasks = list(dict.fromkeys(task for task, _ in places if task))
    lengths = list(dict.fromkeys(length for _, length in places))
    task, at, length = name.partition("@")
    task = "" if task == ALL else task
    if not at and name not in tasks and (name in lengths or not tasks or name[:1].isdigit()):
        task, length = "", task
    if task and task not in tasks:
        raise ConfigError(f"{option} {name}: unknown task '{task}'. {did_you_mean(task, tasks)}")
    lengths = list(dict.fromkeys(size for other, size in places if task in ("", other)))
    if length and length not in lengths:
        raise ConfigError(f"{option} {name}: {length} is not measured. Measured: {', '.join(lengths)}.")
    return task or None, length or None


# --- what was measured ------------------------------------------------------------------------------------------------


def verdict(name: str, limit: float, value: float | None, *, at_most: bool = False) -> dict[str, Any]:
    """Return a limit as a record holds it; what was not measured, or is no number, misses it."""
    passed = value is not None and (value <= limit if at_most else value >= limit)
    rule = "at most" if at_most else "at least"
    return {"name": name, "rule": rule, "limit": limit, "value": value, "passed": passed}


def place_verdicts(
    limits: Sequence[PlaceLimit], value_of: Callable[[str | None, str | None], float | None], *, at_most: bool = False
) -> list[dict[str, Any]]:
    """Return the verdict on each limit; `value_of` gives the score of (task, length)."""
    return [verdict(each.name, each.limit, value_of(each.task, each.length), at_most=at_most) for each in limits]


def require_limits(record: Mapping[str, Any], option: str = FAIL_UNDER) -> None:
    """Raise LongextError that names every limit of a record that was missed."""
    missed = [row for row in record["bars"] if not row["passed"]]
    if missed:
        raise LongextError(f"Missed {option}: {'; '.join(map(_spell, missed))}.")


def _spell(row: Mapping[str, Any]) -> str:
    value = "was not scored" if row["value"] is None else f"is {row['value']:.6g}"
    return f"{row['name']} {value} ({row['rule']} {row['limit']:g})"


def check_lengths(lengths: Sequence[int], minimum: int) -> None:
    """Raise ConfigError unless `lengths` has at least one value and all are >= minimum."""
    if not lengths or min(lengths) < minimum or len(set(lengths)) < len(lengths):
        given = ",".join(map(str, lengths))
        raise ConfigError(f"--lengths must be different whole numbers >= {minimum}, for example 512,1024; got {given}.")


def check_depths(depths: Sequence[float], apart: float, least: int = 0) -> None:
    """Raise ConfigError unless there are `least` depths, and all are at least `apart`."""
    if len(depths) < least or len({round(depth / apart) for depth in depths}) < len(depths):
        raise ConfigError(f"--depths must differ by at least {apart:g}, got {list(depths)}.")
