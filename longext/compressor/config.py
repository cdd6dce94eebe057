"""Settings of `compress-train` and `generate`."""

from __future__ import annotations

from dataclasses import dataclass

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.policies import OBJECTIVES, policy_forms
from longext.data.config import RowsConfig
from longext.options import ChatConfig, DataConfig, RuntimeConfig
from longext.settings import LENGTH, option, override
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
class GenerateConfig(RuntimeConfig, ChatConfig):
    """`longext generate`: continue a text, through a compressor's memory or in a plain model's window."""

    prompt: str | None = option(None, "Text to continue, after the context.")
    context: str | None = option(None, "Text file to read first, or sample; a compressor says what its memory forgot.")
    memory: str | None = option(
        None,
        "Read with a memory, as eval --memory; of a compressor a file of --save-memory to go on from.",
        panel="Method",
    )
    save_memory: str | None = option(None, "Keep what the context became, as a .safetensors file.")
    base: str | None = option(None, "The compressor's model, if that has moved.")
    max_new_tokens: int = option(64, "Tokens to write.", ge=0)
    temperature: float = option(0.0, "0 takes the best token each time, whatever the checkpoint sets.")
    top_p: float = option(1.0, "Draw from the likeliest tokens of this probability.")
    ratio: tuple[int, ...] = option(
        (), "Compression ratio, or several by distance: 2,4,8 (default: the first it was trained on)."
    )
