"""A compress-train config, checked and translated into a spec, a document length and a fingerprint."""

from __future__ import annotations

import dataclasses

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.config import CompressConfig
from longext.compressor.policies import parse_objectives, parse_policy
from longext.compressor.schedule import UNLIMITED, Ratio, Schedule, spelled
from longext.compressor.spec import CompressorSpec, check_fading, check_spec
from longext.data.config import RowsConfig
from longext.errors import ConfigError
from longext.processes.group import is_sharded
from longext.settings import check_names
from longext.training.settings import (
    DECIDING,
    check_data,
    check_optimiser,
    check_processes,
    check_reporting,
)

_DEFAULT_SEGMENTS = 12
DECIDING_COMPRESS = ("arch", "segment", "ratio", "overlap", "objectives", "gradient", *DECIDING)


def check_compress_config(config: CompressConfig) -> None:
    """Raise ConfigError for values out of range or combinations that cannot run; reads no model."""
    check_data(config)
    cls = COMPRESSORS[config.arch]
    check_names(config)
    parse_objectives(config.objectives)
    policy = parse_policy(config.gradient, cls.recurrent)
    check_optimiser(config)
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
        _check_eval_lengths(config.eval_lengths, config.segment)
    if is_sharded():
        raise ConfigError(
            "compress-train keeps the frozen model whole in every process, and this accelerate configuration shards "
            "it: start with torchrun or --num-processes instead."
        )
    check_reporting(config.report_to)


def _check_eval_lengths(lengths: tuple[int, ...], segment: int) -> None:
    if segment < 2:
        raise ConfigError(f"--eval-data needs a --segment of at least 2, got {segment}: its first token is not scored.")
    if len(set(lengths)) < len(lengths) or any(length < 0 or length % segment for length in lengths):
        raise ConfigError(
            f"--eval-lengths must be different multiples of the segment {segment} (0 for none), for example "
            f"0,{segment},{4 * segment}; got {', '.join(map(str, lengths))}."
        )


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
    if config.fading:
        if len(spec.ratios) < 2:
            raise ConfigError(f"--fading needs several ratios, the nearest first, as in 4,8,16; got {spec.ratios[0]}.")
        check_fading(spec, spec.ratios, window)
    return spec


def shortest_text(config: CompressConfig, schedule: Schedule) -> int:
    """Return the tokens of the shortest text that trains: one segment if it is only asked to come back (`ae`)."""
    return schedule.segment if set(parse_objectives(config.objectives)) == {"ae"} else schedule.shortest


def document_length(config: CompressConfig, spec: CompressorSpec, window: int) -> int:
    """Return the tokens of a training document: as asked, else twelve segments or what fits.

    Raises:
        ConfigError: the memories of so many segments do not fit the model's positions.
    """
    # every segment may draw the ratio that makes most slots
    ratio: Ratio = spec.ratios if config.fading else min(spec.ratios)
    schedule = spec.schedule(window, ratio)
    first = schedule.first_reader
    if not schedule.capacity:
        raise ConfigError(
            f"--ratio {spelled(ratio)} makes {schedule.slots(0)} slots of each --segment {spec.segment}, and the "
            f"model's {window} positions hold no memory next to a segment: use larger ratios, a shorter --segment, or "
            "extend the model first (longext extend)."
        )
    most = schedule.max_segments
    if config.document_length is None:
        return spec.segment * min(_DEFAULT_SEGMENTS + first - 1, most)
    shortest = shortest_text(config, schedule)
    if config.document_length < shortest:
        raise ConfigError(
            f"--document-length {config.document_length} is too short for a memory to be read: with --segment "
            f"{spec.segment} and --overlap {spec.overlap} give at least {shortest} tokens."
        )
    segments = -(-config.document_length // spec.segment)
    if segments > most:
        slots = dataclasses.replace(schedule, room=UNLIMITED, capacity=UNLIMITED).num_slots(segments - 1)
        needed = spec.sink + slots + spec.overlap + spec.segment
        raise ConfigError(
            f"--document-length {config.document_length} at ratio {spelled(ratio)} needs sink {spec.sink} + {slots} "
            f"slots + overlap {spec.overlap} + segment {spec.segment} = {needed} "
            f"positions, and the model has {window}: at most {most * spec.segment} tokens fit. Use a larger ratio, or "
            "extend the model first (longext extend)."
        )
    return config.document_length


def token_source(config: CompressConfig) -> RowsConfig:
    """Return the data part of a config as the token cache takes it: answers alone are scored with the objective qa."""
    task = "sft" if "qa" in parse_objectives(config.objectives) else "pretrain"
    names = ("data", "text_field", "split", "max_documents", "max_tokens", "prompt", "control_tokens", "seed")
    return RowsConfig(task=task, **{name: getattr(config, name) for name in names})


def same_shape(one: CompressorSpec, other: CompressorSpec) -> bool:
    """True if the weights of one fit the other: sink and overlap may differ, and ratios if they nest."""

    def shape(spec: CompressorSpec) -> CompressorSpec:
        # if slots have vectors of their own, there are as many as the smallest ratio makes
        ratios = () if COMPRESSORS[spec.arch].nested else (min(spec.ratios),)
        return dataclasses.replace(spec, ratios=ratios, sink=0, overlap=0)

    return shape(one) == shape(other)
