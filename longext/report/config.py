"""The config of `longext report` (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """`longext report`: results side by side."""

    results: tuple[str, ...]
    output: str | None = None
    force: bool = False
