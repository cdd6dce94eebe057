"""A GGUF file in llama.cpp as a `LanguageModel`: what the engine computes, on the tokens that it makes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint.checks import check_scores
from longext.checkpoint.gguf import GgufFile, read_gguf
from longext.checkpoint.gguf_rope import read_gguf_rope
from longext.conversion.gguf.engine import LlamaCpp, engine_version, runs_on_gpu
from longext.conversion.gguf.extend import read_record
from longext.errors import ConfigError, DataError
from longext.models.hf import score_logits
from longext.models.methods import is_unchanged
from longext.models.protocol import TokenScores
from longext.models.turns import Asking
from longext.options import RuntimeConfig
from longext.rope.reading import spec_from_json

_KINDS = {0: "float32", 1: "float16", 30: "bfloat16"}


@dataclass(frozen=True)
class EngineTokenizer:
    """What evaluations ask of a tokenizer besides tokens: which of them are no text."""

    all_special_ids: tuple[int, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None = None


class LlamaCppModel:
    """A GGUF file that llama.cpp runs: scored and continued, not put questions to.

    Args:
        name: what the user called it.
        file: its header.
        engine: it, loaded.
        cache: how keys and values are kept, for the record.
    """

    device = torch.device("cpu")  # where inputs go
    follows_length = False  # one RoPE for all lengths
    kinds = ("perplexity", "passkey")  # what can be measured of it

    def __init__(self, name: str, file: GgufFile, engine: LlamaCpp, cache: str) -> None:
        self.name, self.file, self.engine, self._cache = name, file, engine, cache
        self.asking = Asking()
        self.rope = read_gguf_rope(file)
        self.prefix: tuple[int, ...] = engine.prefix
        self.ending_tokens: frozenset[int] = engine.ending_tokens
        self.tokenizer = EngineTokenizer(tuple(engine.control_tokens), engine.bos, engine.eos)

    @property
    def trained_length(self) -> int:
        """The pre-training length in tokens that its RoPE refers to."""
        record = read_record(self.file)
        spec = spec_from_json(record["origin"]) if record else self.rope.spec
        return spec.original_max_position_embeddings

    @property
    def context_length(self) -> int:
        """How many positions the file says that it has."""
        return self.rope.max_position_embeddings

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return the engine's tokens of a text; with `add_bos` those that it puts in front."""
        ids = self.engine.tokenize(text)
        if not ids and text:
            raise DataError(f"The tokenizer in {self.file.path} makes no token of a text of {len(text)} characters.")
        return [*(self.prefix if add_bos else ()), *ids]

    def decode(self, input_ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens left out."""
        return self.engine.detokenize(input_ids)

    def score(self, input_ids: torch.Tensor, first: int) -> TokenScores:
        """Score tokens first .. T-1 of int64 [B, T], one row after the other.

        Raises:
            LongextError: a score is not a finite number.
        """
        assert first >= 1, "the first token of a window has nothing to be predicted from"
        rows = [self._score_row(row, first) for row in input_ids.tolist()]
        scores = TokenScores(torch.stack([row.nll for row in rows]), torch.stack([row.is_top1 for row in rows]))
        check_scores(scores.nll, first)
        return scores

    def _score_row(self, row: list[int], first: int) -> TokenScores:
        parts, place = [], first
        for logits in self.engine.logits(row[:-1], first - 1):
            targets = torch.tensor(row[place : place + len(logits)])
            parts.append(score_logits(torch.from_numpy(logits).clone(), targets))
            place += len(logits)
        return TokenScores(torch.cat([each.nll for each in parts]), torch.cat([each.is_top1 for each in parts]))

    def greedy(self, input_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of one prompt, `max_new_tokens` at most, up to and with an ending token."""
        return self.engine.continue_greedily(input_ids, max_new_tokens, self.ending_tokens)

    def describe(self) -> dict[str, Any]:
        """Return the model part of a result record."""
        kinds = Counter(each.kind for each in self.file.tensors.values() if len(each.shape) > 1)
        commonest = kinds.most_common(1)[0][0]
        return {
            "id": self.name,
            "config_sha256": _hash(self.file.values),
            "tokenizer_sha256": _hash(self.file.array("tokenizer.ggml.tokens")),
            "rope_parameters": self.rope.parameters,
            "max_position_embeddings": self.rope.max_position_embeddings,
            "attention": "full (llama.cpp)",
            "engine": engine_version(),
            "dtype": _KINDS.get(commonest, f"ggml type {commonest}"),
            "cache_dtype": self._cache,
            "device": "cpu" if not self.engine.on_gpu else "gpu",
            "num_threads": self.engine.num_threads,
            "num_parameters": sum(torch.Size(each.shape).numel() for each in self.file.tensors.values()),
            "prefix": list(self.prefix),
            "ending_tokens": sorted(self.ending_tokens),
        }

    def weights_checksum(self) -> str:
        """Return a hash of every tensor's bytes."""
        digest = hashlib.sha256()
        for tensor in self.file.tensors.values():
            digest.update(f"{tensor.name} {self.file.sha256(tensor)} ".encode())
        return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load_gguf_model(config: RuntimeConfig, method: str | None = None, memory: str | None = None) -> LlamaCppModel:
    """Load the .gguf file `config.model` in llama.cpp.

    `--dtype` is that of cached keys and values: float32 by default.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: a method or memory is to be applied, or there is no such device.
        MissingExtraError: llama-cpp-python is not installed.
    """
    if not is_unchanged(method):
        raise ConfigError(
            "A .gguf is measured as it is. Extend it first: "
            f"longext extend {config.model} --method {method} --factor S -o OUT.gguf"
        )
    if memory or config.attention:
        raise ConfigError(f"--{'memory' if memory else 'attention'} is for checkpoints, and {config.model} is a .gguf.")
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"llama.cpp takes --device auto, cpu, cuda or mps, got '{config.device}'.")
    file = read_gguf(Path(config.model).expanduser())
    on_gpu = config.device != "cpu" and runs_on_gpu()
    if config.device in ("cuda", "mps") and not on_gpu:
        raise ConfigError(f"This {engine_version()} was built without a GPU: leave --device {config.device} out.")
    threads = config.threads or torch.get_num_threads()
    engine = LlamaCpp(file.path, cache=config.dtype, on_gpu=on_gpu, num_threads=threads)
    return LlamaCppModel(config.model, file, engine, "float32" if config.dtype == "auto" else config.dtype)
