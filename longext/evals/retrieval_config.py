"""The configs of the retrieval suites; recipes and flags fill them as they do those of `longext.config`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from longext.config import ChatConfig, RuntimeConfig


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(RuntimeConfig, ChatConfig):
    """`longext eval needle`: RULER's needle tasks by length."""

    tasks: tuple[str, ...] = ("single", "multikey", "multivalue", "multiquery")
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    depths: tuple[float, ...] = ()
    num_trials: int = 10
    num_needles: int = 4
    haystack: str = "book"
    key_type: str = "words"
    value_type: str = "numbers"
    scoring: str = "match"
    max_new_tokens: int = 128
    answer_prefix: bool = True
    fail_under: tuple[str, ...] = ()
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    memory: str | None = None
    segment: int = 128


@dataclass(frozen=True, kw_only=True)
class LongEvalConfig(RuntimeConfig, ChatConfig):
    """`longext eval longeval`: LMSYS's line and topic retrieval."""

    data: str | None = None
    predictions: str | None = None
    tasks: tuple[str, ...] = ("lines", "topics")
    sizes: tuple[int, ...] = ()
    num_cases: int = 50
    complete: bool = False
    fail_under: tuple[str, ...] = ()
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    memory: str | None = None
    segment: int = 128


@dataclass(frozen=True, kw_only=True)
class BABILongConfig(RuntimeConfig, ChatConfig):
    """`longext eval babilong`: bAbI facts in long text."""

    data: str = ""
    tasks: tuple[str, ...] = ("qa1", "qa2", "qa3", "qa4", "qa5")
    lengths: tuple[str, ...] = ()
    num_cases: int | None = None
    max_new_tokens: int = 20
    prompt: str = "examples"
    fail_under: tuple[str, ...] = ()
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    memory: str | None = None
    segment: int = 128
