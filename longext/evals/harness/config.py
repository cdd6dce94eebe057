"""Settings of `eval harness` (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from longext.config import ChatConfig, RuntimeConfig


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(RuntimeConfig, ChatConfig):
    """`longext eval harness`: any task of lm-evaluation-harness; seed and number of resamples are for its own draws."""

    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    metadata: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    max_length: int | None = None
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    seed: int = 1234
    num_bootstrap: int = 1000
    fail_under: tuple[str, ...] = ()
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    memory: str | None = None
    segment: int = 128
