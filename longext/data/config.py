"""Settings that decide the rows a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from longext.options import DataConfig
from longext.settings import LENGTH, option, override

REQUIRED = "Text file, folder, .jsonl, .parquet, Hub dataset id, or sample (bundled story); required."


@dataclass(frozen=True, kw_only=True)
class RowsConfig(DataConfig):
    """Where training text comes from, and how it becomes rows of tokens."""

    data: str = override(DataConfig, "data", "", help=REQUIRED)
    split: str = override(DataConfig, "split", "train")
    task: str = option("pretrain", "Plain text or chats", names=lambda: ("pretrain", "sft"), panel="Data")
    prompt: str = option("auto", "sft: auto (chat template, else plain), chat, plain, llama2.", panel="Data")
    control_tokens: str = option("keep", "Control tokens that a text spells: keep, or text.", panel="Data")
    separate_documents: bool = option(False, "No attention across packed documents.", panel="Data")
    positions: str = option("plain", "pose: skip-wise, with --window", names=lambda: ("plain", "pose"), panel="Method")
    target_length: int | None = option(None, "What positions reach, in tokens.", ge=2, le=LENGTH, panel="Method")
    seed: int = option(0, "Seed of the order.", ge=0, le=2**63 - 1)
