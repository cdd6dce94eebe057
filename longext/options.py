"""Settings that several commands share."""

from __future__ import annotations

from dataclasses import dataclass

from longext.rope.spec import parameter_help
from longext.settings import LENGTH, MANY, option


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How far a RoPE method stretches the context, and the method's own parameters."""

    factor: float | None = option(None, "Target length / trained length, >= 1.", le=MANY, panel="Method")
    target_length: int | None = option(
        None, "Target length in tokens, instead of --factor.", ge=2, le=LENGTH, panel="Method"
    )
    original_length: int | None = option(
        None, "Pre-training length, where the config does not say it.", le=LENGTH, panel="Method"
    )
    rope_theta: float | None = option(None, parameter_help("rope_theta"), le=1e30, panel="Method")
    beta_fast: float | None = option(None, parameter_help("beta_fast"), panel="Method")
    beta_slow: float | None = option(None, parameter_help("beta_slow"), panel="Method")
    ramp: str | None = option(None, parameter_help("ramp"), panel="Method")
    truncate: bool | None = option(None, parameter_help("truncate"), "--truncate", "--no-truncate", panel="Method")
    attention_factor: float | None = option(None, parameter_help("attention_factor"), panel="Method")
    alpha: float | None = option(None, parameter_help("alpha"), panel="Method")
    low_freq_factor: float | None = option(None, parameter_help("low_freq_factor"), panel="Method")
    high_freq_factor: float | None = option(None, parameter_help("high_freq_factor"), panel="Method")
    factors: str | None = option(None, parameter_help("factors"), panel="Method")
    num_clipped: int | None = option(None, parameter_help("num_clipped"), panel="Method")
    clip: str | None = option(None, parameter_help("clip"), panel="Method")
    waves: str | None = option(None, parameter_help("waves"), panel="Method")
    rotary_share: float | None = option(None, parameter_help("rotary_share"), panel="Method")
    replace: bool = option(
        False, "Start from the bare base theta of a model trained with another RoPE.", panel="Method"
    )


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What every command that runs a model shares."""

    model: str = option(help="Directory, Hub id, or books-5m (bundled).", argument=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps, or map (layers over all GPUs).", panel="Running")
    dtype: str = option(
        "auto", "auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16.", panel="Running"
    )
    attention: str | None = option(None, "transformers attention: sdpa, eager, flash_attention_2, ...", panel="Running")
    revision: str | None = option(None, "Branch, tag or commit of a Hub id.", panel="Running")
    trust_remote_code: bool = option(False, "Run model code from the checkpoint.", panel="Running")
    threads: int | None = option(None, "CPU threads (default: the cores that are free).", ge=1, panel="Running")
    seed: int = option(0, "Seed of prompts and bootstrap.", ge=0, le=2**63 - 1, panel="Running")
    output: str | None = option(
        None, "Results directory (default: results/<name>-<time>).", "--output", "-o", panel="Output"
    )
    force: bool = option(False, "Replace an output that longext wrote before.", panel="Output")


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """What commands have whose samples can be dealt over processes."""

    num_processes: int = option(
        1, "Processes that share the samples, on GPUs one each (several machines: torchrun).", ge=1, panel="Running"
    )


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A server that runs a model."""

    endpoint: str | None = option(
        None,
        "Address of an OpenAI-compatible completions server that runs the model; MODEL is then its tokenizer.",
        panel="Server",
    )
    endpoint_model: str | None = option(None, "Name of the model there (default: the only one).", panel="Server")
    endpoint_key: str = option(
        "LONGEXT_ENDPOINT_KEY",
        "Environment variable that holds the server's key, which is written nowhere.",
        panel="Server",
    )
    endpoint_timeout: float = option(600.0, "Seconds to wait for an answer.", ge=1, le=MANY, panel="Server")
    concurrency: int = option(8, "Requests at once.", ge=1, le=1024, panel="Server")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from and how much of them is read."""

    data: str = option(
        "sample", "Text file, folder, .jsonl, .parquet, Hub dataset id, or sample (bundled story).", panel="Data"
    )
    text_field: str = option("text", "Column of the text in jsonl, parquet and Hub data.", panel="Data")
    split: str = option("test", "Split of a Hub dataset.", panel="Data")
    max_documents: int | None = option(None, "Read at most this many documents.", ge=1, panel="Data")
    max_tokens: int | None = option(None, "Cut each document to this many tokens.", ge=2, panel="Data")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How questions are put to a model, and what of its answers is read."""

    chat_template: bool | None = option(
        None,
        "Ask through the tokenizer's chat template (default: where it has one).",
        "--chat-template",
        "--no-chat-template",
        panel="Chat",
    )
    template_arg: tuple[str, ...] = option(
        (), "key=value for the chat template, e.g. enable_thinking=false; may be repeated.", repeats=True, panel="Chat"
    )
    strip_thinking: bool | None = option(
        None,
        "Take a leading thought off answers (default: if the tokenizer knows marks of thoughts).",
        "--strip-thinking",
        "--no-strip-thinking",
        panel="Chat",
    )
    neutralise_control_tokens: bool = option(
        False, "Write control tokens that a text spells with a space, so as text.", panel="Chat"
    )
