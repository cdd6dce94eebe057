"""Successive elimination: candidates measured on the same places and prompts until the best is told apart.

A place is the end of a text; its last tokens are scored with the trained length, half the target and the target as
context. Candidates that are told apart from a better one are measured no further (Even-Dar et al., 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longext.evals.sequential.means import LOOKS
from longext.evals.statistics import paired_interval, sign_test, wilson_interval

FEWEST = 6  # places before an answer is more than a guess
ROUNDS = LOOKS[:5]  # places after which candidates are dropped: each look costs confidence
_LOOKS = 2 * len(ROUNDS)  # two measures at each


@dataclass(eq=False)
class Candidate:
    """One method, and what was measured of it.

    Attributes:
        name: as commands spell it.
        rank: how much it asks of its user; of candidates that are not told apart one of the lowest is taken.
        is_checkpoint: a serving engine reads it; these compete among themselves too.
        is_control: it is measured to compare with, and never taken.
        nll: mean NLL of the scored tokens at each place, by context length.
        found: 1 or 0 for each passkey prompt.
        seconds: what it took.
        beaten_by: name of the candidate that it was told apart from, "" while it is measured.
    """

    name: str
    rank: int
    is_checkpoint: bool
    is_control: bool = False
    nll: dict[int, list[float]] = field(default_factory=dict)
    found: list[int] = field(default_factory=list)
    seconds: float = 0.0
    beaten_by: str = ""

    def perplexity(self, length: int) -> float:
        """Return exp of the mean NLL with `length` tokens of context."""
        return math.exp(float(np.mean(self.nll[length])))

    @property
    def recall(self) -> float:
        """The share of prompts that it answered."""
        return float(np.mean(self.found)) if self.found else 0.0


def nll_difference(one: Candidate, other: Candidate, length: int) -> NDArray[np.float64]:
    """Return NLL of `one` minus that of `other` at the places that both were measured at, float64 [n]."""
    pairs = list(zip(one.nll[length], other.nll[length], strict=False))
    return np.array([a - b for a, b in pairs])


def is_worse_text(one: Candidate, other: Candidate, length: int) -> bool:
    """True if `one` is told apart from `other` by a higher perplexity at `length`."""
    differences = nll_difference(one, other, length)
    return len(differences) >= ROUNDS[0] and paired_interval(differences, _LOOKS)[0] > 0


def is_worse_recall(one: Candidate, other: Candidate) -> bool:
    """True if `one` is told apart from `other` by fewer passkeys."""
    pairs = list(zip(one.found, other.found, strict=False))
    better, worse = (sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
    return worse > better and sign_test(better, worse) < 0.05 / _LOOKS


def is_beaten(one: Candidate, other: Candidate, length: int) -> bool:
    """True if `one` is told apart from `other` as worse by one measure, and not as better by the other."""
    text = is_worse_text(one, other, length) - is_worse_text(other, one, length)
    recall = is_worse_recall(one, other) - is_worse_recall(other, one)
    return text + recall > 0 and min(text, recall) >= 0


def drop_beaten(candidates: Iterable[Candidate], length: int) -> list[Candidate]:
    """Return the candidates that nothing beats that could stand for them, and mark the others.

    What an engine reads is dropped only for something else that an engine reads.
    """
    alive = [each for each in candidates if not each.beaten_by]
    for one in alive:
        rivals = [
            other
            for other in alive
            if other is not one
            and not (other.is_control or other.beaten_by)
            and (other.is_checkpoint or not one.is_checkpoint)
        ]
        beaten = [other for other in rivals if is_beaten(one, other, length)]
        if beaten:
            one.beaten_by = best_of(beaten, length)[0].name
    return [each for each in alive if not each.beaten_by]


def best_of(candidates: Sequence[Candidate], length: int) -> tuple[Candidate, list[Candidate]]:
    """Return (the candidate to take, those not told apart from it).

    Most passkeys decide, then perplexity at `length`, then the lowest rank: each only among those that the measure
    before does not tell apart from its best. With too few places to tell anything apart the best numbers are taken.
    """
    if len(candidates[0].nll[length]) < FEWEST:
        chosen = max(candidates, key=lambda each: (each.recall, -each.perplexity(length)))
        return chosen, [each for each in candidates if each is not chosen]
    most = max(candidates, key=lambda each: each.recall)
    finders = [each for each in candidates if not is_worse_recall(each, most)]
    lowest = min(finders, key=lambda each: each.perplexity(length))
    tied = [each for each in finders if not is_worse_text(each, lowest, length)]
    chosen = min(tied, key=lambda each: (each.rank, each.perplexity(length)))
    return chosen, [each for each in tied if each is not chosen]


def is_decided(candidates: Sequence[Candidate], length: int) -> bool:
    """True if what to take is told apart from all others, for engines and for everyone."""
    return all(not best_of(group, length)[1] for group in groups(candidates).values())


def groups(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """Return what is chosen from: what serving "engines" read, if there is any, and everything for "transformers"."""
    alive = [each for each in candidates if not each.beaten_by and not each.is_control]
    readable = [each for each in alive if each.is_checkpoint]
    return {**({"engines": readable} if readable else {}), "transformers": alive}


def eliminate(
    candidates: Sequence[Candidate],
    length: int,
    num_places: int,
    measure: Callable[[Candidate, int], None],
    is_late: Callable[[], bool],
) -> int:
    """Measure place after place for all that are not beaten yet, and return how many places were measured.

    Args:
        measure: measures one candidate at the place of that number.
        is_late: True when no further place may be begun.
    """
    alive = list(candidates)
    for place in range(num_places):
        if place and is_late():
            return place
        for each in alive:
            measure(each, place)
        if place + 1 in ROUNDS:
            alive = drop_beaten(alive, length)
            if place + 1 >= FEWEST and is_decided(alive, length):
                return place + 1
    return num_places


def summary(each: Candidate, base: Candidate, lengths: Sequence[int], trained: int) -> dict[str, Any]:
    """Return what a record says of a candidate; `base` is the model as it is, for the price within its trained length.

    Intervals are of 95 %: paired ones for changes of perplexity, Wilson's for passkeys.
    """
    low, high = wilson_interval(sum(each.found), len(each.found))
    texts = [{"length": length, "ppl": each.perplexity(length)} for length in lengths if each.nll.get(length)]
    return {
        "name": each.name,
        "is_checkpoint": each.is_checkpoint,
        "is_control": each.is_control,
        "perplexity": texts,
        "price": _change(each, base, trained, trained),
        "against_window": _change(each, base, max(lengths), trained),
        "passkey": {
            "num_correct": sum(each.found),
            "num_trials": len(each.found),
            "accuracy": each.recall,
            "low": low,
            "high": high,
        },
        "num_places": len(each.nll.get(trained, ())),
        "seconds": each.seconds,
        "beaten_by": each.beaten_by or None,
    }


def _change(each: Candidate, base: Candidate, length: int, base_length: int) -> Mapping[str, float] | None:
    """Return the change of perplexity at `length` against the base at `base_length`, on the same tokens."""
    pairs = list(zip(each.nll.get(length, ()), base.nll[base_length], strict=False))
    if not pairs:
        return None
    differences = [a - b for a, b in pairs]
    row = {"change": math.expm1(float(np.mean(differences)))}
    if len(pairs) < FEWEST:
        return row
    low, high = paired_interval(differences)
    return {**row, "change_low": math.expm1(low), "change_high": math.expm1(high)}
