"""Settings of `compare`, `advise`, `gate`, `report` and `eval diff`."""

from __future__ import annotations

from dataclasses import dataclass

from longext.evals.base import ReadingConfig
from longext.evals.limits import PLACES
from longext.options import DataConfig, RuntimeConfig, SharedConfig
from longext.settings import LENGTH, MANY, option


@dataclass(frozen=True, kw_only=True)
class CompareConfig(SharedConfig, RuntimeConfig, DataConfig):
    """`longext compare`: every method on the same documents, seeds and protocol."""

    methods: tuple[str, ...] = option(
        ("none", "linear", "ntk", "ntk-by-parts", "dynamic", "yarn"),
        "Methods, comma-separated; parameters as name:key=value.",
    )
    factor: float = option(8.0, "Target length / trained length.", le=MANY, panel="Method")
    lengths: tuple[int, ...] = option((512, 1024, 2048, 4096), "Context lengths in tokens, comma-separated.", le=LENGTH)
    stride: int | None = option(
        None, "Tokens the window moves (sliding, longlora; default: 256, at most half of a short window)."
    )
    depths: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0), "Needle depths from 0 (start) to 1 (end), comma-separated."
    )
    num_trials: int = option(4, "Prompts per length and depth.", le=MANY)
    num_buckets: int = option(16, "Position buckets (positional).", ge=1, le=MANY)
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)
    passkey: bool = option(True, "Include the passkey test.", "--passkey", "--no-passkey")
    batch_tokens: int | None = option(
        None, "Tokens per forward pass (default: one window on a CPU, 32768 on a GPU).", ge=1, panel="Running"
    )


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(RuntimeConfig, DataConfig):
    """`longext advise`: methods on the user's own text until one is told apart, or the time is up."""

    target_length: int = option(help="Length in tokens that the model should reach.", ge=2, le=LENGTH)
    methods: tuple[str, ...] = option(
        (), "Methods to try, comma-separated; parameters as name:key=value (default: all that need nothing else)."
    )
    minutes: float = option(10.0, "Most minutes to measure; it ends earlier if the answer is clear.", ge=0, le=MANY)
    num_places: int = option(48, "Most places of the text, each with two passkey prompts.", ge=1, le=MANY)


@dataclass(frozen=True, kw_only=True)
class GateConfig(ReadingConfig, DataConfig):
    """`longext gate`: does a model pass, decided with as few prompts and windows as the error rate allows."""

    tests: tuple[str, ...] = option(("passkey",), "Of passkey, needle and ruler, comma-separated; none for none.")
    lengths: tuple[int, ...] = option((512, 1024, 2048, 4096), "Lengths in tokens, comma-separated.", le=LENGTH)
    fail_under: tuple[str, ...] = option(
        (),
        f"Least accuracy (default: 0.8): {PLACES.replace('TASK', 'TEST')}; may be repeated.",
        repeats=True,
    )
    num_prompts: int = option(200, "Prompts of each test and length that are planned.", ge=1, le=MANY)
    fail_over: tuple[str, ...] = option((), "LENGTH=PPL: the highest perplexity; may be repeated.", repeats=True)
    baseline: str | None = option(None, "Model whose perplexity on the same windows, at every length, is the limit.")
    margin: float = option(0.02, "Share by which the perplexity may be above the baseline's.", ge=0, le=MANY)
    num_windows: int = option(64, "Windows of text of each length that are planned.", ge=1, le=MANY)
    error_rate: float = option(
        0.05, "Chance that the answer is not that of all prompts and windows; 0: none.", ge=0, le=0.5
    )
    summary: str | None = option(
        None, "Append a Markdown table to this file (default: GITHUB_STEP_SUMMARY, if set).", panel="Output"
    )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """`longext report`: results side by side."""

    results: tuple[str, ...] = option(
        help="Result directories, directories that hold some, or result.json files.", argument=True, repeats=True
    )
    output: str | None = option(
        None, "Directory of the report (default: results/report-<time>).", "--output", "-o", panel="Output"
    )
    force: bool = option(False, "Replace an output that longext wrote before.", panel="Output")


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """`longext eval diff`: two results."""

    a: str = option(help="Result directory, or its result.json.", argument=True)
    b: str = option(help="Another of the same kind.", argument=True)
