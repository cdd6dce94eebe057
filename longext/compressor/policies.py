"""Which reader's gradient reaches which memory: a matrix of weights W[t, s], drawn before anything is run.

The gradient of a document is the sum over segments s < t of z_ts = (dJ_t/dm_s)(dm_s/dTheta); a policy weighs its terms
(UIO-LLMs, arXiv 2406.18173, equations 5 to 12, with m_t a function of segment t alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longext.errors import ConfigError
from longext.registry import Registry

Weights = NDArray[np.float64]
_Draw = Callable[[Sequence[int], int, np.random.Generator], Weights]


@dataclass(frozen=True)
class Kind:
    """A family of policies.

    Attributes:
        summary: for help and tables.
        draw: (memories visible to each segment, size, rng) -> W.
        executor: "sweep" (encode again, one graph alive), "stream" (hold graphs while they are needed) or "graph".
        sized: takes a size, as in `window:2`.
        recurrent: may be used where memories depend on earlier memories.
    """

    summary: str
    draw: _Draw
    executor: str
    sized: bool = True
    recurrent: bool = False


@dataclass(frozen=True)
class Policy:
    """A policy with its size, as parsed from text such as "reservoir:2"."""

    name: str
    size: int

    @property
    def kind(self) -> Kind:
        """Its family."""
        return POLICIES[self.name]

    def __str__(self) -> str:
        return f"{self.name}:{self.size}" if self.kind.sized else self.name

    def draw(self, visible: Sequence[int], rng: np.random.Generator) -> Weights:
        """Return W float64 [T, T]: W[t, s] for the memories s < visible[t] that segment t reads, 0 elsewhere."""
        return self.kind.draw(visible, self.size, rng)


POLICIES: Registry[Kind] = Registry("gradient policy")


def parse_policy(text: str, recurrent: bool = False) -> Policy:
    """Return the policy called `text`: exact, full, window:S, reservoir:S, reservoir-raw:S, subset:N or stop:S.

    Raises:
        ConfigError: unknown name, a size missing, needless or below 1, or a policy that drops the paths between
            memories of a recurrent architecture.
    """
    name, colon, size = text.partition(":")
    kind = POLICIES[name]
    if kind.sized and not (size.isdigit() and int(size) >= 1):
        raise ConfigError(f"--gradient {name} needs a size >= 1, for example {name}:2; got '{text}'.")
    if colon and not kind.sized:
        raise ConfigError(f"--gradient {name} takes no size, got '{text}'.")
    if recurrent and not kind.recurrent:
        allowed = ", ".join(f"{n}:S" if POLICIES[n].sized else n for n in POLICIES if POLICIES[n].recurrent)
        raise ConfigError(
            f"--gradient {text} assumes memories that do not depend on one another, and this architecture's do: "
            f"use {allowed}."
        )
    return Policy(name, int(size) if kind.sized else 0)


def _all(visible: Sequence[int], _: int, __: np.random.Generator) -> Weights:
    weights = np.zeros((len(visible), len(visible)))
    for t, count in enumerate(visible):
        weights[t, :count] = 1.0
    return weights


def _window(visible: Sequence[int], size: int, _: np.random.Generator) -> Weights:
    weights = np.zeros((len(visible), len(visible)))
    for t, count in enumerate(visible):
        weights[t, max(0, count - size) : count] = 1.0
    return weights


def _reservoir(visible: Sequence[int], size: int, rng: np.random.Generator, factor: bool = True) -> Weights:
    """Draw a uniform S-subset of the memories so far for every segment, by Vitter's algorithm R."""
    weights = np.zeros((len(visible), len(visible)))
    held: list[int] = []
    seen = 0
    for t, count in enumerate(visible):
        for s in range(seen, count):
            if len(held) < size:
                held.append(s)
            elif (place := int(rng.integers(0, s + 1))) < size:
                held[place] = s
        seen = max(seen, count)
        weights[t, held] = max(1.0, count / size) if factor else 1.0
    return weights


def _reservoir_raw(visible: Sequence[int], size: int, rng: np.random.Generator) -> Weights:
    return _reservoir(visible, size, rng, factor=False)


def _subset(visible: Sequence[int], size: int, rng: np.random.Generator) -> Weights:
    weights = _all(visible, 0, rng)
    total = max(visible)
    if size >= total:
        return weights
    chosen = rng.choice(total, size, replace=False)
    kept = np.zeros_like(weights)
    kept[:, chosen] = weights[:, chosen] * (total / size)
    return kept


def _stop(visible: Sequence[int], size: int, rng: np.random.Generator) -> Weights:
    block = np.arange(len(visible)) // size
    weights: Weights = _all(visible, 0, rng) * (block[:, None] == block[None, :])
    return weights


POLICIES.register("exact", Kind("the gradient itself; each segment encoded again", _all, "sweep", False, True))
POLICIES.register("window", Kind("incremental TBPTT: the last S memories", _window, "stream"))
POLICIES.register("reservoir", Kind("S random memories, with the factor that makes it unbiased", _reservoir, "stream"))
POLICIES.register("reservoir-raw", Kind("S random memories without the factor, as released", _reservoir_raw, "stream"))
POLICIES.register("subset", Kind("n random memories for all readers, unbiased", _subset, "sweep"))
POLICIES.register("stop", Kind("within blocks of S segments", _stop, "sweep", True, True))
POLICIES.register("full", Kind("one graph of the whole document", _all, "graph", False, True))
