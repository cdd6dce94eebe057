"""Settings of `compress-train` and `generate`."""

from __future__ import annotations

from dataclasses import dataclass

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.policies import OBJECTIVES, policy_forms
from longext.options import ChatConfig, DataConfig, RuntimeConfig
from longext.settings import LENGTH, option, setting
from longext.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class CompressConfig(TrainingConfig, DataConfig):
    """`longext compress-train`: train a compressor on a frozen model (UIO-LLMs and its family)."""

    data: str = option("", "Required: text file, folder, .jsonl, .parquet, Hub dataset id, or sample.", panel="Data")
    split: str = option("train", "Split of a Hub dataset.", panel="Data")
    accumulation: int = option(1, "Passes per step.", ge=1)
    learning_rate: float = option(0.0001, "Peak learning rate.")
    schedule: str = setting("cosine")
    weight_decay: float = setting(0.1, ge=0)
    prompt: str = option("auto", "qa: auto (chat template, else plain), chat, plain, llama2.")
    arch: str = option("uio", names=lambda: COMPRESSORS)
    memory_kind: str | None = option(None, "icae: soft (vectors) or kv.")
    segment: int = option(1024, "Tokens of a segment.", ge=1, panel="Method")
    ratio: tuple[int, ...] = option((8,), "Tokens per memory slot; several (4,8,16) are drawn per segment.")
    sink: int | None = option(None, "First raw tokens that stay readable (default 1; gist 0).", ge=0)
    overlap: int = option(0, "Last raw tokens that stay readable.", ge=0)
    document_length: int | None = option(
        None, "Tokens of a training document (default: 12 segments, or what fits).", ge=2, le=LENGTH
    )
    objectives: str = option("lm", f"{', '.join(OBJECTIVES)} with weights, as in lm:1,ae:0.2.")
    gradient: str = option("exact", f"{', '.join(policy_forms())}.")
    grad_check: int | None = option(None, "Compare with the exact gradient every N steps.", ge=1)
    lora_r: int = option(128, "LoRA rank.", ge=1, le=2**16)
    lora_alpha: int = option(512, "LoRA alpha.", ge=1)
    init: str | None = option(None, "Start from the weights of this compressor.")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RuntimeConfig, ChatConfig):
    """`longext generate`: continue a text, through a compressor's memory or in a plain model's window."""

    prompt: str | None = option(None, "Text to continue, after the context.")
    context: str | None = option(None, "Text file to read first, or sample; a compressor says what its memory forgot.")
    memory: str | None = option(None, "Go on from a memory that --save-memory wrote.", panel="Method")
    save_memory: str | None = option(None, "Keep what the context became, as a .safetensors file.")
    base: str | None = option(None, "The compressor's model, where that has moved.")
    max_new_tokens: int = option(64, "Tokens to write.", ge=0)
    temperature: float = option(0.0, "0 takes the best token each time, whatever the checkpoint sets.")
    top_p: float = option(1.0, "Draw from the likeliest tokens of this probability.")
    ratio: int | None = option(None, "Compression ratio (default: the first it was trained on).")
