"""What a compressor learns, and which reader's gradient reaches which memory, by the names that options take.

A policy is a matrix of weights W[t, s], drawn before anything is run. The gradient of a document is the sum over
segments s < t of z_ts = (dJ_t/dm_s)(dm_s/dTheta); a policy weighs its terms (UIO-LLMs, arXiv 2406.18173, equations 5 to
12, with m_t a function of segment t alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longext.errors import ConfigError
from longext.registry import Registry

if TYPE_CHECKING:  # options list these names, and they start without numpy
    import numpy as np
    from numpy.typing import NDArray

    Weights = NDArray[np.float64]
    _Draw = Callable[[Sequence[int], int, np.random.Generator], Weights]


@dataclass(frozen=True)
class Kind:
    """A family of policies; its summary is in the registry.

    Attributes:
        draw: (memories visible to each segment, size, rng) -> W.
        executor: "sweep" (encode again, one graph alive), "stream" (hold graphs while they are needed) or "graph".
        size: the letter of its size in `--gradient`, as in `window:S`; "" if it takes none.
        recurrent: may be used if memories depend on earlier memories.
    """

    draw: _Draw
    executor: str
    size: str = ""
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
        return f"{self.name}:{self.size}" if self.kind.size else self.name

    def draw(self, visible: Sequence[int], rng: np.random.Generator) -> Weights:
        """Return W float64 [T, T]: W[t, s] for the memories s < visible[t] that segment t reads, 0 elsewhere."""
        return self.kind.draw(visible, self.size, rng)


POLICIES: Registry[Kind] = Registry("gradient policy")
OBJECTIVES: Registry[None] = Registry("objective")
TOKEN_OBJECTIVES = ("lm", "longce", "qa")  # cross-entropy of a document's tokens, in one pass


def policy_forms(recurrent: bool = False) -> list[str]:
    """Return the policies as `--gradient` takes them; `recurrent`: those for memories that depend on earlier ones."""
    kinds = {name: POLICIES[name] for name in POLICIES}
    chosen = {name: kind for name, kind in kinds.items() if kind.recurrent or not recurrent}
    return [f"{name}:{kind.size}" if kind.size else name for name, kind in chosen.items()]


def parse_policy(text: str, recurrent: bool = False) -> Policy:
    """Return the policy called `text`, of one of the `policy_forms`.

    Raises:
        ConfigError: unknown name, a size missing, needless or below 1, or a policy that drops the paths between
            memories of a recurrent architecture.
    """
    name, colon, size = text.partition(":")
    kind = POLICIES[name]
    if kind.size and not (size.isdigit() and int(size) >= 1):
        raise ConfigError(f"--gradient {name} needs a size >= 1, for example {name}:2; got '{text}'.")
    if colon and not kind.size:
        raise ConfigError(f"--gradient {name} takes no size, got '{text}'.")
    if recurrent and not kind.recurrent:
        raise ConfigError(
            f"--gradient {text} assumes memories that do not depend on one another, and this architecture's do: "
            f"use {', '.join(policy_forms(recurrent))}."
        )
    return Policy(name, int(size) if kind.size else 0)


def _blank(visible: Sequence[int]) -> Weights:
    import numpy as np

    return np.zeros((len(visible), len(visible)))


def _all(visible: Sequence[int], _: int, __: np.random.Generator) -> Weights:
    return _window(visible, len(visible), __)


def _window(visible: Sequence[int], size: int, _: np.random.Generator) -> Weights:
    weights = _blank(visible)
    for t, count in enumerate(visible):
        weights[t, max(0, count - size) : count] = 1.0
    return weights


def _reservoir(visible: Sequence[int], size: int, rng: np.random.Generator, factor: bool = True) -> Weights:
    """Draw a uniform S-subset of the memories so far for every segment, by Vitter's algorithm R."""
    weights = _blank(visible)
    chosen: list[int] = []
    seen = 0
    for t, count in enumerate(visible):
        for s in range(seen, count):
            if len(chosen) < size:
                chosen.append(s)
            elif (place := int(rng.integers(0, s + 1))) < size:
                chosen[place] = s
        seen = max(seen, count)
        # a memory is among the chosen with probability S / count: the factor makes the expected weight 1
        weights[t, chosen] = max(1.0, count / size) if factor else 1.0
    return weights


def _reservoir_raw(visible: Sequence[int], size: int, rng: np.random.Generator) -> Weights:
    return _reservoir(visible, size, rng, factor=False)


def _subset(visible: Sequence[int], size: int, rng: np.random.Generator) -> Weights:
    weights, total = _all(visible, 0, rng), max(visible)
    if size >= total:
        return weights
    chosen = rng.choice(total, size, replace=False)
    chosen_weights = _blank(visible)
    # one draw for all readers, with probability N / total for each memory: the expected weight is 1 again
    chosen_weights[:, chosen] = weights[:, chosen] * (total / size)
    return chosen_weights


def _stop(visible: Sequence[int], size: int, rng: np.random.Generator) -> Weights:
    weights = _all(visible, 0, rng)
    for t in range(len(visible)):
        weights[t, : t // size * size] = 0.0  # memories from before the block of t
    return weights


POLICIES.register("exact", Kind(_all, "sweep", recurrent=True), "the gradient itself; each segment encoded again")
POLICIES.register("window", Kind(_window, "stream", "S"), "incremental TBPTT: the last S memories")
POLICIES.register(
    "reservoir", Kind(_reservoir, "stream", "S"), "S random memories, with the factor that makes it unbiased"
)
POLICIES.register(
    "reservoir-raw", Kind(_reservoir_raw, "stream", "S"), "S random memories without the factor, as released"
)
POLICIES.register("subset", Kind(_subset, "sweep", "N"), "N random memories for all readers, unbiased")
POLICIES.register("stop", Kind(_stop, "sweep", "S", recurrent=True), "within blocks of S segments")
POLICIES.register("full", Kind(_all, "graph", recurrent=True), "one graph of the whole document")


# --- objectives -------------------------------------------------------------------------------------------------------

OBJECTIVES.register("lm", None, "cross-entropy of each next token given memories and the raw segment")
OBJECTIVES.register("ae", None, "cross-entropy of a segment given its memory and the repeat token (auto-encoding)")
OBJECTIVES.register("qa", None, "cross-entropy of the answers in instructions and chats")
OBJECTIVES.register(
    "longce", None, "lm with each token weighed by what the frozen model gains from text beyond the segment, at most 5"
)
OBJECTIVES.register("distill", None, "KL divergence from the frozen model that reads the text raw, up to its window")


def parse_objectives(text: str) -> dict[str, float]:
    """Return name -> weight of text such as "lm", "lm:1,ae:0.2" or "qa,distill:0.5".

    Raises:
        ConfigError: unknown name, a weight that is no positive number, or two of lm, qa and longce.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        OBJECTIVES[name]
        try:
            weights[name] = float(number or 1)
        except ValueError:
            weights[name] = 0.0
        if not 0 < weights[name] < float("inf"):
            raise ConfigError(f"--objectives takes name:weight with a weight above 0, got '{part}'.")
    if len(given := [name for name in TOKEN_OBJECTIVES if name in weights]) > 1:
        raise ConfigError(
            f"--objectives {' and '.join(given)} are ways to score the same tokens (lm all alike, longce by what far "
            "text is worth, qa the answers alone): choose one of them."
        )
    return weights
