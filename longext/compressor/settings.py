"""A compress-train config, checked and translated into a spec, a document length and a fingerprint."""

from __future__ import annotations

import dataclasses
from typing import Any

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.config import CompressConfig
from longext.compressor.policies import parse_objectives, parse_policy
from longext.compressor.spec import CompressorSpec, check_spec
from longext.errors import ConfigError
from longext.evals.memory.next_segment import check_context_lengths
from longext.training.config import FinetuneConfig
from longext.training.processes import is_sharded
from longext.training.settings import check_optimiser, check_processes, check_reporting, fingerprint, world_size

_DEFAULT_SEGMENTS = 12
# Settings that decide which numbers come next: a checkpoint continues only a run that agrees on them.
_DECIDING = (
    "prompt",
    "arch",
    "segment",
    "ratio",
    "overlap",
    "objectives",
    "gradient",
    "lora_r",
    "lora_alpha",
    "batch_size",
    "accumulation",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "dtype",
    "sequence_parallel",
)


def check_compress_config(config: CompressConfig) -> None:
    """Raise ConfigError for values out of range or combinations that cannot run; reads no model."""
    if not config.data:
        raise ConfigError(
            "Give --data: a text file, folder, .jsonl, .parquet, Hub dataset id, or sample (bundled story)."
        )
    cls = COMPRESSORS[config.arch]
    parse_objectives(config.objectives)
    policy = parse_policy(config.gradient, cls.recurrent)
    check_optimiser(config)
    if config.schedule not in ("constant", "linear", "cosine"):
        raise ConfigError(f"`schedule` must be one of constant, linear, cosine, got '{config.schedule}'.")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"--dtype for training must be auto, float32 or bfloat16, got '{config.dtype}'.")
    if config.context_parallel > 1:
        raise ConfigError("compress-train shares a document's segments with --sequence-parallel, not context_parallel.")
    if config.sequence_parallel > 1 and (cls.recurrent or policy.kind.executor != "sweep"):
        raise ConfigError(
            "--sequence-parallel needs memories that do not depend on one another and --gradient exact, subset:N or "
            f"stop:S; got --arch {config.arch}, --gradient {config.gradient}."
        )
    check_processes(config)
    if config.trust_remote_code:
        raise ConfigError("`trust_remote_code` is not for compressors: memories need an architecture of transformers.")
    if config.eval_data is not None:
        check_context_lengths(config.eval_lengths or (config.segment,), config.segment)
    if is_sharded():
        raise ConfigError(
            "compress-train keeps the frozen model whole in every process, and this accelerate configuration shards "
            "it: start with torchrun or --num-processes instead."
        )
    check_reporting(config.report_to)


def global_batch(config: CompressConfig) -> int:
    """Return the documents of one optimiser step, all processes together."""
    return config.batch_size * config.accumulation * world_size(config) // config.sequence_parallel


def spec_of(config: CompressConfig, window: int) -> CompressorSpec:
    """Return the spec that a config asks for, checked against a model of `window` positions.

    Raises:
        ConfigError: as `check_spec`.
    """
    cls = COMPRESSORS[config.arch]
    memory = config.memory_kind or cls.memories[0]
    sink = config.sink if config.sink is not None else (0 if cls.trains_reader and memory == "kv" else 1)
    spec = CompressorSpec(
        arch=config.arch,
        segment=config.segment,
        ratios=config.ratio,
        sink=sink,
        overlap=config.overlap,
        memory=memory,
        rank=config.lora_r,
        alpha=float(config.lora_alpha),
    )
    check_spec(spec, window)
    return spec


def document_length(config: CompressConfig, spec: CompressorSpec, window: int) -> int:
    """Return the tokens of a training document: as asked, else twelve segments or what fits.

    Raises:
        ConfigError: the memories of so many segments do not fit the model's positions.
    """
    ratio = min(spec.ratios)  # every segment may draw the ratio that makes most slots
    schedule = spec.schedule(window, ratio)
    first = schedule.first_reader
    if not schedule.capacity:
        raise ConfigError(
            f"--ratio {ratio} makes {spec.segment // ratio} slots of each --segment {spec.segment}, and the model's "
            f"{window} positions hold no memory beside a segment: use larger ratios, a shorter --segment, or extend "
            "the model first (longext extend)."
        )
    most = schedule.max_segments
    if config.document_length is None:
        return spec.segment * min(_DEFAULT_SEGMENTS + first - 1, most)
    if config.document_length < schedule.shortest:
        raise ConfigError(
            f"--document-length {config.document_length} is too short for a memory to be read: with --segment "
            f"{spec.segment} and --overlap {spec.overlap} give at least {schedule.shortest} tokens."
        )
    segments = -(-config.document_length // spec.segment)
    if segments > most:
        slots = (segments - first) * (spec.segment // ratio)
        raise ConfigError(
            f"--document-length {config.document_length} at ratio {ratio} needs sink {spec.sink} + {slots} slots + "
            f"overlap {spec.overlap} + segment {spec.segment} = {spec.sink + slots + spec.overlap + spec.segment} "
            f"positions, and the model has {window}: at most {most * spec.segment} tokens fit. Use a larger ratio, or "
            "extend the model first (longext extend)."
        )
    return config.document_length


def token_source(config: CompressConfig) -> FinetuneConfig:
    """Return the data part of a config as the token cache takes it: answers alone are scored with the objective qa."""
    task = "sft" if "qa" in parse_objectives(config.objectives) else "pretrain"
    names = ("model", "data", "text_field", "split", "max_documents", "max_tokens", "prompt", "seed")
    return FinetuneConfig(task=task, **{name: getattr(config, name) for name in names})


def compress_fingerprint(
    config: CompressConfig,
    spec: CompressorSpec,
    model_config: dict[str, Any],
    base_weights: str,
    report: dict[str, Any],
    processes: int,
) -> dict[str, Any]:
    """Return everything that decides the numbers of a run, as plain JSON values."""
    settings = {name: getattr(config, name) for name in _DECIDING}
    settings |= {"sink": spec.sink, "memory": spec.memory, "row_length": report["row_length"], "init": config.init}
    return fingerprint(config, settings, model_config, base_weights, report["tokens_sha256"], processes)


def same_shape(one: CompressorSpec, other: CompressorSpec) -> bool:
    """True where the weights of one fit the other: sink and overlap may differ, and ratios where they nest."""

    def shape(spec: CompressorSpec) -> CompressorSpec:
        # where slots have vectors of their own, there are as many as the smallest ratio makes
        ratios = () if COMPRESSORS[spec.arch].nested else (min(spec.ratios),)
        return dataclasses.replace(spec, ratios=ratios, sink=0, overlap=0)

    return shape(one) == shape(other)
