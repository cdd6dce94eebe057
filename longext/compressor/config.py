"""Settings of `compress-train`, `generate`, `chat` and `memory`."""

from __future__ import annotations

from dataclasses import dataclass

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.policies import OBJECTIVES, policy_forms
from longext.compressor.schedule import WHEN_FULL
from longext.data.config import RowsConfig
from longext.options import ChatConfig, DataConfig, RuntimeConfig
from longext.settings import LENGTH, MANY, option, override
from longext.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class CompressConfig(TrainingConfig, DataConfig):
    """`longext compress-train`: train a compressor on a frozen model (UIO-LLMs and its family)."""

    data: str = override(RowsConfig, "data")
    split: str = override(RowsConfig, "split")
    prompt: str = override(RowsConfig, "prompt", help="qa: auto (chat template, else plain), chat, plain, llama2.")
    control_tokens: str = override(RowsConfig, "control_tokens")
    document_length: int | None = option(
        None, "Tokens of a training document (default: 12 segments, or what fits).", ge=2, le=LENGTH, panel="Data"
    )
    eval_lengths: tuple[int, ...] = override(
        TrainingConfig, "eval_lengths", help="Tokens of context to measure at (default: 1, 4 and 12 segments).", ge=0
    )
    arch: str = option("uio", "Architecture", names=lambda: COMPRESSORS, panel="Method")
    segment: int = option(1024, "Tokens of a segment.", ge=1, panel="Method")
    ratio: tuple[int, ...] = option(
        (8,), "Tokens per memory slot; several (4,8,16) are drawn per segment.", panel="Method"
    )
    fading: bool = option(
        False, "Read the ratios by distance, newest first, as --memory OUT@4,8,16 does.", panel="Method"
    )
    memory_kind: str | None = option(None, "icae: soft (vectors) or kv.", panel="Method")
    sink: int | None = option(None, "First raw tokens that stay readable (default 1; gist 0).", ge=0, panel="Method")
    overlap: int = option(0, "Last raw tokens that stay readable.", ge=0, panel="Method")
    init: str | None = option(None, "Start from the weights of this compressor.", panel="Method")
    objectives: str = option("lm", f"{', '.join(OBJECTIVES)} with weights, as in lm:1,ae:0.2.", panel="Training")
    gradient: str = option("exact", f"{', '.join(policy_forms())}.", panel="Training")
    grad_check: int | None = option(None, "Compare with the exact gradient every N steps.", ge=1, panel="Training")
    lora_r: int = option(128, "LoRA rank.", ge=1, le=2**16, panel="Training")
    lora_alpha: int = option(512, "LoRA alpha.", ge=1, panel="Training")
    batch_size: int = override(TrainingConfig, "batch_size", help="Documents per process and pass.")
    accumulation: int = override(TrainingConfig, "accumulation", 1, help="Passes per step.")
    learning_rate: float = override(TrainingConfig, "learning_rate", 1e-4)
    schedule: str = override(TrainingConfig, "schedule", "cosine")
    weight_decay: float = override(TrainingConfig, "weight_decay", 0.1)
    sequence_parallel: int = override(
        TrainingConfig, "sequence_parallel", help="Processes that share each document's segments."
    )
    # known to every training, refused here
    context_parallel: int = override(TrainingConfig, "context_parallel", is_flag=False)
    trust_remote_code: bool = override(TrainingConfig, "trust_remote_code", is_flag=False)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(RuntimeConfig):
    """Which model reads, how, and what it keeps of what it reads: shared by `generate`, `chat` and `memory`."""

    model: str = override(
        RuntimeConfig,
        "model",
        "",
        help="Directory, Hub id, books-5m (bundled), or compressor; a memory names its own.",
    )
    method: str | None = option(
        None, "Apply this extension method in memory first; parameters as name:key=value.", panel="Method"
    )
    factor: float | None = option(None, "Factor of --method: target length / trained length.", le=MANY, panel="Method")
    memory: str | None = option(
        None, "Read with a memory, as eval --memory; or go on from a file of `longext memory build`.", panel="Method"
    )
    segment: int | None = option(
        None, "Tokens of a segment (--memory; default 128; compressors: their own).", ge=1, panel="Method"
    )
    ratio: tuple[int, ...] = option(
        (), "Of a compressor, or several by distance: 2,4,8 (default: the first it was trained on).", panel="Method"
    )
    base: str | None = option(None, "The compressor's model, if that has moved.", panel="Method")
    when_full: str | None = option(
        None,
        "When there is no more room (default: thin, where memories can be thinned, else forget; in a plain window "
        "refuse, in a chat forget)",
        names=lambda: WHEN_FULL,
        panel="Method",
    )


@dataclass(frozen=True, kw_only=True)
class WritingConfig(MemoryConfig, ChatConfig):
    """How a text is continued: shared by `generate` and `chat`."""

    max_new_tokens: int = option(64, "Tokens to write.", ge=0, le=MANY)
    temperature: float = option(0.0, "0 takes the best token each time, whatever the checkpoint sets.")
    top_p: float = option(1.0, "Draw from the likeliest tokens of this probability.")
    stop: tuple[str, ...] = option((), "Text that ends what is written, left out of it; may be repeated.", repeats=True)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(WritingConfig):
    """`longext generate`: continue a text, through a compressor's memory or in a plain model's window."""

    prompt: str | None = option(None, "Text to continue, after the context.")
    context: str | None = option(None, "Text file to read first, or sample; a compressor says what its memory forgot.")
    save_memory: str | None = option(None, "Keep what the context became, as a .safetensors file.")


@dataclass(frozen=True, kw_only=True)
class ConversationConfig(WritingConfig):
    """`longext chat`: talk with a model in the terminal."""

    max_new_tokens: int = override(WritingConfig, "max_new_tokens", 512, help="Tokens of an answer at most.", ge=1)
    system: str | None = option(None, "System message.", panel="Chat")
    context: tuple[str, ...] = option((), "Text file to read first, or sample; may be repeated.", repeats=True)


@dataclass(frozen=True, kw_only=True)
class BuildConfig(MemoryConfig, DataConfig, ChatConfig):
    """`longext memory`: a file of what a memory keeps of documents."""

    action: str = option(help="build or inspect.", argument=True)
    sources: tuple[str, ...] = option(
        (), "build: documents (files, folders, sample); inspect: a memory file.", argument=True, repeats=True
    )
    model: str = override(MemoryConfig, "model", argument=False, help="Model that reads; a compressor names its own.")
    output: str | None = override(RuntimeConfig, "output", help="File to write.")
    force: bool = override(RuntimeConfig, "force", help="Replace a memory file that is there.")
    # the sources are arguments
    data: str = override(DataConfig, "data", is_flag=False)
    max_tokens: int | None = override(DataConfig, "max_tokens", is_flag=False)
    seed: int = override(RuntimeConfig, "seed", is_flag=False)
    strip_thinking: bool | None = override(ChatConfig, "strip_thinking", is_flag=False)
