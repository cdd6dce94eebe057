"""What a way to search is, what it works on, and the ways by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from longext.registry import Registry


@dataclass(frozen=True)
class Candidate:
    """Frequencies to try.

    Attributes:
        factors: lambda_i, what base frequencies are divided by, rotary_dim / 2 of them.
        attention_factor: what multiplies cos and sin.
        point: the numbers that it was made from, for reports.
    """

    factors: tuple[float, ...]
    attention_factor: float
    point: dict[str, float] = field(default_factory=dict, compare=False)

    @cached_property
    def key(self) -> str:
        """A hash of its numbers."""
        return hashlib.sha256(json.dumps([self.factors, self.attention_factor]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Space:
    """What is searched in.

    Attributes:
        num_pairs: rotary_dim / 2.
        factor: s, target length / trained length.
        trained_length: L.
        critical_pair: the theoretical one.
        yarn: the starting point: YaRN's frequencies and temperature.
        most_temperature: the largest attention factor that --short-price allows; infinite without one.
        seed: of everything drawn.
        evaluations: most candidates.
        num_samples: samples of one candidate.
    """

    num_pairs: int
    factor: float
    trained_length: int
    critical_pair: int
    yarn: Candidate
    most_temperature: float
    seed: int
    evaluations: int
    num_samples: int

    @property
    def su_temperature(self) -> float:
        """LongRoPE's attention factor, sqrt(1 + ln s / ln L) (arXiv 2402.13753)."""
        return math.sqrt(1 + math.log(self.factor) / math.log(self.trained_length))


class Ask(Protocol):
    """Return the score of a candidate on the first `num_samples` samples, lower is better."""

    def __call__(self, candidate: Candidate, num_samples: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Searcher:
    """One way to search.

    Attributes:
        title, reference: for reports.
        evaluations: how many candidates it tries if nothing says less.
        search: the search; returns the best candidate. It draws from seeded generators alone and hears nothing but
            `ask`, so that a search that was killed repeats itself up to where it was.
        windows: about how many windows of the target length a search takes, for the estimate.
        weights: what of a score counts: "guarded" (numbers, and a guard on text and short text), "needle" (numbers
            alone), "text" (plain perplexity).
    """

    title: str
    reference: str
    evaluations: int
    search: Callable[[Space, Ask], Candidate]
    windows: Callable[[Space], int] = lambda space: space.evaluations * space.num_samples
    weights: str = "guarded"


SEARCHERS: Registry[Searcher] = Registry("searcher", package="longext.searching.searchers", order=("curve",))


def critical_pair(rotary_dim: int, rope_theta: float, trained_length: int) -> int:
    """Return ceil((d / 2) log_theta(L / 2 pi)): the first pair without a full turn in L (arXiv 2502.20082)."""
    return math.ceil(rotary_dim / 2 * math.log(trained_length / (2 * math.pi)) / math.log(rope_theta))


def record_of(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as JSON."""
    return {
        "long_factor": list(candidate.factors),
        "attention_factor": candidate.attention_factor,
        "point": candidate.point,
    }
