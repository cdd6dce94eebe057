"""One dataclass per command; recipes (YAML) and flags both fill it.

Precedence: defaults < recipe (`-c FILE`) < `--set key=value` < flags actually typed. Unknown keys are errors. No torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from longext.errors import ConfigError
from longext.registry import did_you_mean
from longext.untrusted import parse_yaml, read_yaml, shown, type_name


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How far a RoPE method stretches the context, and the method's own parameters."""

    factor: float | None = None
    target_length: int | None = None
    original_length: int | None = None
    rope_theta: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    ramp: str | None = None
    truncate: bool | None = None
    attention_factor: float | None = None
    alpha: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    factors: str | None = None
    replace: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtendConfig(RopeConfig):
    """`longext extend`: one checkpoint, one method, one length."""

    model: str
    method: str
    output: str | None = None
    revision: str | None = None
    copy: bool = False
    check: bool = True
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What every command that runs a model shares."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    output: str | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from and how much of them is read."""

    data: str = "sample"
    text_field: str = "text"
    split: str = "test"
    max_documents: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How questions are put to a model, and what of its answers is read."""

    chat_template: bool | None = None
    template_arg: tuple[str, ...] = ()
    strip_thinking: bool | None = None
    neutralise_control_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(RuntimeConfig, DataConfig):
    """`longext eval ppl`: perplexity by length under a named protocol."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    protocol: str = "sliding"
    stride: int | None = None
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    num_buckets: int = 16
    num_bootstrap: int = 1000
    memory: str | None = None
    segment: int = 128
    num_places: int = 12
    fail_over: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig(RuntimeConfig):
    """`longext passkey`: retrieval accuracy by length and depth."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_trials: int = 4
    protocol: str = "landmark"
    filler: str = "landmark"
    num_needles: int = 1
    num_digits: int = 5
    fail_under: tuple[str, ...] = ()
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    memory: str | None = None
    segment: int = 128


@dataclass(frozen=True, kw_only=True)
class LongBenchConfig(RuntimeConfig, ChatConfig):
    """`longext eval longbench`: the 21 tasks of LongBench under their authors' protocol, or lm-eval's."""

    tasks: tuple[str, ...] = ()
    backend: str = "official"
    longbench_e: bool = False
    data: str = "hub"
    max_length: int | None = None
    limit: int | None = None
    code_similarity: str = "difflib"
    predictions: str | None = None
    fail_under: tuple[str, ...] = ()
    method: str | None = None
    factor: float | None = None
    batch_tokens: int | None = None
    memory: str | None = None
    segment: int = 128
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RuntimeConfig, DataConfig):
    """`longext compare`: every method on the same documents, seeds and protocol."""

    methods: tuple[str, ...] = ("none", "linear", "ntk", "ntk-by-parts", "dynamic", "yarn")
    factor: float = 8.0
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    stride: int | None = None
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_trials: int = 4
    num_buckets: int = 16
    num_bootstrap: int = 1000
    passkey: bool = True
    batch_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RuntimeConfig):
    """What every training run shares: steps, optimiser, memory, checkpoints, processes."""

    num_steps: int = 1000
    batch_size: int = 1
    accumulation: int = 8
    learning_rate: float = 2e-5
    schedule: str = "constant"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpointing: bool = True
    offload: bool = False
    loss_chunk: int = 4096
    eval_data: str | None = None
    eval_split: str = "validation"
    eval_lengths: tuple[int, ...] = ()
    eval_documents: int = 8
    eval_every: int | None = None
    log_every: int = 1
    save_every: int | None = 100
    keep_checkpoints: int = 2
    resume: bool = False
    report_to: str = "none"
    control_tokens: str = "keep"
    num_processes: int = 1
    sequence_parallel: int = 1
    context_parallel: int = 1
    collective_timeout: int = 1800
    stop_grace: int = 600


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig, DataConfig, RopeConfig):
    """`longext finetune`: extend a checkpoint and train it at the new length (LongLoRA)."""

    data: str = ""
    split: str = "train"
    method: str = "none"
    task: str = "pretrain"
    prompt: str = "auto"
    window: int | None = None
    positions: str = "plain"
    separate_documents: bool = False
    tuning: str = "lora+embed+norm"
    norms: str = "all"
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | None = None
    quantize: str = "none"
    save_dtype: str = "auto"
    attention: str | None = None
    group_size: int | None = None
    group_ratio: float = 0.25
    backend: str = "auto"


@dataclass(frozen=True, kw_only=True)
class CompressConfig(TrainingConfig, DataConfig):
    """`longext compress-train`: train a compressor on a frozen model (UIO-LLMs and its family)."""

    data: str = ""
    split: str = "train"
    prompt: str = "auto"
    arch: str = "uio"
    memory_kind: str | None = None
    segment: int = 1024
    ratio: tuple[int, ...] = (8,)
    sink: int | None = None
    overlap: int = 0
    document_length: int | None = None
    objectives: str = "lm"
    gradient: str = "exact"
    grad_check: int | None = None
    lora_r: int = 128
    lora_alpha: int = 512
    init: str | None = None
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RuntimeConfig, ChatConfig):
    """`longext generate`: continue a text, through a compressor's memory or in a plain model's window."""

    prompt: str | None = None
    context: str | None = None
    memory: str | None = None
    save_memory: str | None = None
    base: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    ratio: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(RuntimeConfig, DataConfig):
    """`longext eval reconstruction`: what comes back of a text from its memory."""

    base: str | None = None
    ratio: tuple[int, ...] | None = None
    content: tuple[str, ...] = ("text",)
    num_samples: int = 100
    batch_tokens: int | None = None
    num_bootstrap: int = 1000


@dataclass(frozen=True, kw_only=True)
class EfficiencyConfig(RuntimeConfig):
    """`longext eval efficiency`: time and memory of a growing context."""

    base: str | None = None
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    ratio: tuple[int, ...] | None = None
    window: int | None = None
    num_new_tokens: int = 16
    num_repeats: int = 3


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """`longext merge`: an adapter into a standard checkpoint."""

    adapter: str
    base: str | None = None
    revision: str | None = None
    output: str | None = None
    dtype: str = "auto"
    check: bool = True
    trust_remote_code: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(RopeConfig):
    """`longext convert`: an adapter's pickle files into safetensors."""

    adapter: str
    base: str | None = None
    revision: str | None = None
    method: str | None = None
    output: str | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """`longext plan`: memory, FLOPs and time of a training run before it is paid for."""

    model: str
    length: int
    gpus: str = "1xH100-80GB"
    method: str = "longlora"
    attention: str | None = None
    batch_size: int = 1
    lora_r: int = 8
    group_ratio: float = 0.25
    group_size: int | None = None
    checkpointing: bool = True
    offload: bool = False
    loss_chunk: int = 4096
    sharding: str = "auto"
    sequence_parallel: int = 1
    dtype: str = "bfloat16"
    utilisation: float = 0.45
    num_tokens: int | None = None
    probe: bool = False
    revision: str | None = None
    output: str | None = None
    force: bool = False


ConfigT = TypeVar("ConfigT")


def build_config(
    kind: type[ConfigT],
    recipe: Path | None,
    settings: Sequence[str],
    typed: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Return a `kind` from a recipe file, `--set key=value` strings and the flags the user typed, in rising priority.

    Args:
        defaults: the command's own defaults, under all of them.

    Raises:
        ConfigError: unknown key, wrong type, or a required key that nothing gave.
    """
    values: dict[str, Any] = dict(defaults or {})
    if recipe is not None:
        values.update(_checked(kind, load_recipe(recipe), str(recipe)))
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got '{setting}'.")
        given = {key.strip(): parse_yaml(text, f"--set {key.strip()}")}
        values.update(_checked(kind, given, f"--set {shown(setting)}"))
    values.update(_checked(kind, dict(typed), "the command line"))
    _check_ranges(values)
    missing = [field.name for field in _required(kind) if values.get(field.name) is None]
    if missing:
        raise ConfigError(f"Missing: {', '.join(missing)}. Give it as an argument or flag, or in the recipe (-c FILE).")
    return kind(**values)


def find_recipe(name: str) -> Path:
    """Return the recipe file called `name`: a path, or a name inside the shipped recipes (`extend/books-5m-4k-yarn`).

    Raises:
        ConfigError: no such file; names the nearest shipped recipe.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    shipped = shipped_recipes()
    key = name.removesuffix(".yaml").removeprefix("recipes/")
    if key in shipped:
        return shipped[key]
    raise ConfigError(f"No recipe '{name}'. {did_you_mean(key, shipped)}")


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with longext, as name -> file (accelerate's own config files are none)."""
    package = Path(__file__).parent
    root = next((folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()), None)
    if root is None:
        return {}
    found = {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}
    return {name: file for name, file in found.items() if not name.startswith("accelerate/")}


def load_recipe(path: Path) -> dict[str, Any]:
    """Return the mapping in a recipe file (ConfigError where it is missing, broken or not a mapping)."""
    try:
        value = read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"No recipe file {path}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold key: value lines, found {type_name(value)}.")
    return value


def to_recipe(config: Any) -> str:
    """Return `config` as recipe YAML that `build_config` reads back.

    Keys at their default are left out, and so are `force` and `resume`: making something again begins anew, and must
    not replace it unasked.
    """
    fields = [field for field in dataclasses.fields(config) if field.name not in ("force", "resume")]
    defaults = {field.name: field.default for field in fields}
    asked = dataclasses.asdict(config)
    values = {key: asked[key] for key, default in defaults.items() if asked[key] != default}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def _required(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]


def _checked(kind: Any, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `values` with each one converted to its field's type; unknown keys and wrong types are errors."""
    known = typing.get_type_hints(kind)
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'. {did_you_mean(key, known)}")
    return {key: _convert(value, known[key], f"{where}: `{key}`") for key, value in values.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    target = next(option for option in options if option is not type(None))
    if typing.get_origin(target) is tuple:
        items = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(_convert(item, typing.get_args(target)[0], where) for item in items)
    if target is bool or isinstance(value, bool):
        if target is bool and isinstance(value, bool):
            return value
        raise ConfigError(f"{where} must be {_spell(target)}, got {shown(value)}.")
    try:
        number = target(value) if target is not int or float(value) == int(float(value)) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or target is str and isinstance(value, (list, dict)):
        raise ConfigError(f"{where} must be {_spell(target)}, got {shown(value)}.")
    if isinstance(number, float) and not math.isfinite(number):
        raise ConfigError(f"{where} must be a finite number, got {number}.")
    if target is str and "\0" in number:
        raise ConfigError(f"{where} must not have a NUL character in it.")
    return number


# The least value of counts, checked here because recipes and --set pass no flag parser.
_AT_LEAST = {
    "seed": 0,
    "num_bootstrap": 0,
    "max_documents": 1,
    "max_tokens": 2,
    "batch_tokens": 1,
    "num_buckets": 1,
    "num_steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "loss_chunk": 1,
    "eval_documents": 1,
    "eval_every": 1,
    "log_every": 1,
    "save_every": 1,
    "keep_checkpoints": 1,
    "num_processes": 1,
    "sequence_parallel": 1,
    "context_parallel": 1,
    "collective_timeout": 1,
    "stop_grace": 0,
    "window": 2,
    "lora_r": 1,
    "lora_alpha": 1,
    "group_size": 2,
    "length": 1,
    "target_length": 2,  # a row of one token has nothing to predict
    "num_tokens": 1,
    "num_samples": 1,
    "num_cases": 1,
    "max_new_tokens": 0,
    "num_new_tokens": 1,
    "num_repeats": 1,
    "segment": 1,
    "num_places": 1,
    "sink": 0,
    "overlap": 0,
    "document_length": 2,
    "grad_check": 1,
    "max_length": 2,
    "limit": 1,
    "num_fewshot": 0,
}


_LENGTH = 2**31  # tokens: what a config's max_position_embeddings may be
_MANY = 10**6  # counts of things that are done one after the other
# The largest value; other whole numbers end at `_LARGEST`.
_AT_MOST = {
    "seed": 2**63 - 1,
    "factor": 1e6,
    "rope_theta": 1e30,
    "utilisation": 1.0,
    **dict.fromkeys(
        ("target_length", "original_length", "lengths", "length", "window", "max_length", "document_length"), _LENGTH
    ),
    **dict.fromkeys(("num_trials", "num_bootstrap", "num_buckets", "num_places", "num_repeats", "num_cases"), _MANY),
    **dict.fromkeys(("num_needles", "num_digits", "batch_size", "num_samples", "keep_checkpoints"), _MANY),
    **dict.fromkeys(("num_processes", "sequence_parallel", "context_parallel", "lora_r"), 2**16),
}
_LARGEST = 2**53


def _check_ranges(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        for own in value if isinstance(value, tuple) else (value,):
            if isinstance(own, bool) or not isinstance(own, (int, float)):
                continue
            least, most = _AT_LEAST.get(key), _AT_MOST.get(key, _LARGEST if isinstance(own, int) else math.inf)
            if least is not None and own < least:
                raise ConfigError(f"`{key}` must be >= {least}, got {own}.")
            if own > most or own < -_LARGEST:
                raise ConfigError(f"`{key}` must be <= {most:.17g}, got {shown(own)}.")


def _spell(target: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[target]
