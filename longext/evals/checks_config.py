"""The configs of `eval short` and `eval effective`; recipes and flags fill them as they do those of `longext.config`.

No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from longext.config import ChatConfig, DataConfig, RuntimeConfig


@dataclass(frozen=True, kw_only=True)
class ShortConfig(RuntimeConfig, DataConfig):
    """`longext eval short`: what a model loses within the trained length of its base."""

    against: str | None = None
    tolerance: float = 0.02
    lengths: tuple[int, ...] = ()
    num_windows: int = 8
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    num_bootstrap: int = 1000
    memory: str | None = None
    segment: int = 128


@dataclass(frozen=True, kw_only=True)
class EffectiveConfig(RuntimeConfig, ChatConfig):
    """`longext eval effective`: the longest length at which retrieval reaches a bar."""

    max_length: int
    min_length: int = 128
    bar: float = 0.8
    test: str = "passkey"
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_trials: int = 4
    fail_under: int | None = None
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    memory: str | None = None
    segment: int = 128
