"""Settings of evaluations."""

from __future__ import annotations

from dataclasses import dataclass

from longext.evals.base import ReadingConfig
from longext.options import ChatConfig, DataConfig, RuntimeConfig
from longext.settings import LENGTH, MANY, option


@dataclass(frozen=True, kw_only=True)
class LongBenchConfig(ReadingConfig, ChatConfig):
    """`longext eval longbench`: the 21 tasks of LongBench under their authors' protocol, or lm-eval's."""

    tasks: tuple[str, ...] = option((), "Tasks, comma-separated (default: all).")
    backend: str = option("official", "official, or lm-eval: its own prompts, cuts and metrics, another protocol.")
    longbench_e: bool = option(False, "LongBench-E: 13 tasks, scores by length.", "--e")
    data: str = option("hub", "Folder with <task>.jsonl files, or hub.", panel="Data")
    max_length: int | None = option(
        None,
        "Tokens of a prompt; longer ones lose their middle (default: by the context). lm-eval: of "
        "prompt and answer; the beginning goes.",
        ge=2,
        le=LENGTH,
    )
    limit: int | None = option(None, "Only the first rows of each task.", ge=1)
    code_similarity: str = option(
        "difflib", "difflib, or levenshtein (the authors' score where python-Levenshtein is installed)."
    )
    predictions: str | None = option(
        None, "Score these answers (<task>.jsonl in the authors' schema); MODEL only names them.", panel="Output"
    )
    fail_under: tuple[str, ...] = option(
        (),
        "TASK=SCORE, english=SCORE or chinese=SCORE, 0 to 100: exit with 1 below it; may be repeated.",
        repeats=True,
        panel="Output",
    )
    resume: bool = option(False, "Only go on with an unfinished run of the same -o; start none.", panel="Output")


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(ReadingConfig, ChatConfig):
    """`longext eval harness`: any task of lm-evaluation-harness; seed and number of resamples are for its own draws."""

    seed: int = option(1234, "Seed of prompts and bootstrap.", ge=0, le=2**63 - 1, panel="Running")
    tasks: tuple[str, ...] = option((), "Tasks or groups of lm-eval, comma-separated.")
    include_path: str | None = option(
        None, "Folder with task files of your own (*.yaml; the Python beside them is run)."
    )
    metadata: tuple[str, ...] = option(
        (),
        "key=value for tasks that make their own data (RULER: max_seq_lengths=[4096,8192]; tokenizer is "
        "MODEL's by default); may be repeated.",
        repeats=True,
    )
    num_fewshot: int | None = option(None, "Examples in a prompt (default: the task's own).", ge=0)
    limit: int | None = option(None, "Only the first documents of each task.", ge=1)
    max_length: int | None = option(
        None, "Tokens read at once; longer inputs lose their beginning (default: the context).", ge=2, le=LENGTH
    )
    system_instruction: str | None = option(None, "System message, or first lines of prompts.")
    fewshot_as_multiturn: bool | None = option(
        None,
        "Examples as turns of a conversation (default with --chat-template), or in one message.",
        "--fewshot-as-multiturn",
        "--fewshot-in-one-turn",
    )
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)
    fail_under: tuple[str, ...] = option(
        (),
        "TASK=SCORE or TASK:METRIC=SCORE, in the metric's own unit: exit with 1 where it is worse; may be repeated.",
        repeats=True,
        panel="Output",
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(RuntimeConfig, DataConfig):
    """`longext eval reconstruction`: what comes back of a text from its memory."""

    base: str | None = option(None, "The model it was trained on, where that has moved.")
    ratio: tuple[int, ...] | None = option(None, "Ratios, comma-separated (default: those of training).")
    content: tuple[str, ...] = option(("text",), "Of text, shuffled (words) and random (tokens), comma-separated.")
    num_samples: int = option(100, "Segments to reconstruct, drawn at random.", ge=1, le=MANY)
    batch_tokens: int | None = option(
        None, "Tokens per forward pass (default: one window on a CPU, 32768 on a GPU).", ge=1, panel="Running"
    )
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)


@dataclass(frozen=True, kw_only=True)
class EfficiencyConfig(RuntimeConfig):
    """`longext eval efficiency`: time and memory of a growing context."""

    base: str | None = option(None, "The model it was trained on, where that has moved.")
    lengths: tuple[int, ...] = option((512, 1024, 2048, 4096), "Context lengths in tokens, comma-separated.", le=LENGTH)
    ratio: tuple[int, ...] | None = option(None, "Ratios, comma-separated (default: those of training).")
    window: int | None = option(
        None, "Raw tokens of the window to compare with (default: the model's positions).", ge=2, le=LENGTH
    )
    num_new_tokens: int = option(16, "Tokens decoded behind the context.", ge=1)
    num_repeats: int = option(3, "Timed runs of each point; the best counts.", ge=1, le=MANY)
