"""The one place for models: configs, tokenizers and weights come in through transformers here, whole or not at all.

No other module calls `from_pretrained` of a config, tokenizer or model (conversion/_reload.py does the same in a
process of its own). Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.checkpoint.checks import check_complete, check_finite, check_float_weights, check_sizes, check_stored
from longext.checkpoint.source import read_config
from longext.checkpoint.tying import follow_weights
from longext.checkpoint.weights import Shard, read_shards
from longext.errors import CheckpointError, ConfigError, LongextError

if TYPE_CHECKING:
    import torch

MAPPED = "map"  # --device map: layers spread over all devices by accelerate
_LONGEST = 300  # characters of a library's message that are shown
_NAMED = (OSError, ValueError, RuntimeError, ImportError)  # their messages say what is wrong without their kind


# --- configs ----------------------------------------------------------------------------------------------------------


def load_config(directory: Path, trust_remote_code: bool | None = None) -> Any:
    """Return transformers' config object of the model in `directory`.

    Args:
        trust_remote_code: run code of the checkpoint's own; None for a command that never does.

    Raises:
        CheckpointError: transformers cannot read it, or it needs code of its own.
    """
    _check_type(read_config(directory), str(directory / "config.json"))
    from transformers import AutoConfig

    with explained(f"transformers cannot read {directory / 'config.json'}", trust_remote_code):
        return AutoConfig.from_pretrained(directory, trust_remote_code=bool(trust_remote_code))


def is_known_type(config: dict[str, Any]) -> bool:
    """Return True if transformers has a class of its own for the model type of a parsed config.json."""
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def build_model_config(config: dict[str, Any]) -> Any:
    """Return the transformers config object of a parsed config.json.

    Raises:
        CheckpointError: transformers has no such class, or it refuses a value.
    """
    from longext.checkpoint import _built

    _check_type(config, "config.json")
    model_type = config["model_type"]
    if "auto_map" in config and not is_known_type(config):
        raise CheckpointError(
            f"A model of type '{model_type}' is not part of transformers, and needs code of its own (config.json: "
            "auto_map), which can neither be trained nor given another RoPE here. Give a model of a class of "
            "transformers."
        )
    with explained(f"transformers cannot read the config.json of this {model_type} model"):
        return _built.load_config(config)


def _check_type(config: dict[str, Any], where: str) -> None:
    if not isinstance(config.get("model_type"), str):
        # transformers would guess the class from the directory's name
        raise CheckpointError(f"{where} has no `model_type`. Restore the model's own config.json.")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def load_tokenizer(directory: Path, trust_remote_code: bool | None = None) -> Any:
    """Return the tokenizer in `directory`.

    Raises:
        CheckpointError: transformers cannot load one, or loads one without a vocabulary.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    has_config = (directory / "config.json").is_file()  # transformers reads it for the tokenizer too
    if has_config:
        read_config(directory)
    try:
        with explained(f"{directory} has no tokenizer that transformers can load", trust_remote_code):
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=bool(trust_remote_code))
            tokenizer("a")  # settings of the wrong type are met when a text is
            # without its files some classes come up with only their special tokens, and make no token of any text
            plain = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    except CheckpointError:
        if has_config:
            load_config(directory, trust_remote_code)  # it may be what is wrong
        raise
    if not plain:
        raise CheckpointError(
            f"{directory} has no tokenizer: its vocabulary is empty but for special tokens. Copy the model's own "
            "tokenizer.json (or tokenizer.model) next to config.json."
        )
    return tokenizer


# --- models -----------------------------------------------------------------------------------------------------------


def load_causal_lm(
    directory: Path,
    *,
    config: Any = None,
    dtype: Any = "auto",
    device: torch.device | None = None,
    attention: str | None = None,
    trust_remote_code: bool | None = None,
    device_map: Any = None,
    quantization: Any = None,
    filled_later: Collection[str] = (),
) -> Any:
    """Return the causal LM in `directory` with every weight from its files, all of them finite.

    The check for finite values reads every weight once, on its device (about 6 GB/s on one CPU core).

    Args:
        config: transformers' config object; by default that of the directory.
        dtype: torch dtype, or "auto" for the checkpoint's own.
        device: where the model goes (None: where it was loaded).
        attention: `attn_implementation`.
        trust_remote_code: run code of the checkpoint's own; None for a command that never does.
        device_map: as transformers takes it.
        quantization: transformers' quantisation config.
        filled_later: weights that the files may lack, since the caller brings them (the output matrix of an adapter).

    Raises:
        CheckpointError: it cannot be loaded; weights are missing, left over, of another shape, integers or not finite.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    shards = read_shards(directory)
    if config is None:
        config = load_config(directory, trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{directory} is an encoder-decoder model. Give a causal language model.")
    config.return_dict = True  # some ask for tuples; outputs are read by name here
    check_sizes(config, shards, directory)
    _refuse_kernels(config, attention, bool(trust_remote_code))
    with explained(f"transformers cannot load {directory}", trust_remote_code), _conversion_errors():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=bool(trust_remote_code),
            device_map=device_map,
            quantization_config=quantization,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # transformers' own refusal does not say which; check_complete does
        )
    info["missing_keys"] = set(info["missing_keys"]) - set(filled_later)
    check_complete(model, info, directory, config)
    follow_weights(model)
    if device is not None and device_map is None:
        model = model.to(device)
    _check_weights(model, directory, shards)
    return model


def _refuse_kernels(config: Any, attention: str | None, trusted: bool) -> None:
    """Refuse a config.json that names attention code on the Hub: transformers would fetch and run it."""
    kernel = getattr(config.get_text_config(), "_attn_implementation", None)
    if attention is None and not trusted and isinstance(kernel, str) and "/" in kernel:
        raise CheckpointError(
            f"config.json asks for attention code from the Hub (attn_implementation '{kernel}'), which is not run "
            "unasked. Remove that key."
        )


def _check_weights(model: Any, directory: Path, shards: list[Shard]) -> None:
    is_quantised = getattr(model.config, "quantization_config", None) is not None
    if not is_quantised:
        check_float_weights(model, shards)
    if is_quantised or any(parameter.is_meta for parameter in model.parameters()):
        check_stored(shards)  # quantising makes numbers of NaN, and offloaded weights are not in memory
    check_finite(model, directory)


def build_model(config: Any, *, dtype: Any = None, trust_remote_code: bool | None = None) -> Any:
    """Return a causal LM of `config` with random weights (none under `torch.device("meta")`).

    Raises:
        CheckpointError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    with explained(f"transformers cannot build a {config.model_type} model", trust_remote_code):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=bool(trust_remote_code))


# --- devices and dtypes -----------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" takes a CUDA device, else Apple's, else the CPU."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N, mps or map, got '{name}'.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N, mps or map, got '{name}'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s) here.")
    return device


def resolve_dtype(name: str, device: torch.device) -> Any:
    """Return the dtype called `name`; "auto" is float32 on a CPU and the checkpoint's own elsewhere."""
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype must be auto, float32, bfloat16 or float16, got '{name}'.")
    return getattr(torch, name)


# --- what libraries say -----------------------------------------------------------------------------------------------


def quiet_transformers() -> None:
    """Silence transformers' notes and loading bars: longext prints its own."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def explained(what: str, trust_remote_code: bool | None = None) -> Iterator[None]:
    """Turn whatever a library raises into one CheckpointError, "WHAT: the reason"; memory and Ctrl-C pass through.

    Args:
        trust_remote_code: the user's choice; None for a command that has no option for it.
    """
    try:
        yield
    except LongextError:
        raise
    except Exception as error:  # a loader meets code of every family, and files of every kind
        if is_out_of_memory(error) or _is_interrupt(error):
            raise
        if "trust_remote_code=True" in str(error):
            advice = "" if trust_remote_code is None else " If you trust its author, add --trust-remote-code."
            raise CheckpointError(
                f"{what}: it needs code of its own (config.json: auto_map), which is not run unasked.{advice}"
            ) from error
        raise CheckpointError(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """One line of an error's message: all of it if it is short, else its first line; its kind if it needs that."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        first = first_line(error)
        text = (text if first.endswith(":") else first)[:_LONGEST].rstrip()
    if not text:
        return type(error).__name__
    speaks = isinstance(error, _NAMED) and not isinstance(error, RecursionError)
    return text if speaks else f"{type(error).__name__}: {text}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for the errors that Python and torch raise if there is no memory left."""
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return is_torchs or isinstance(error, MemoryError)


def _is_interrupt(error: BaseException | None) -> bool:
    """True for the ImportError that transformers makes of a Ctrl-C that meets its lazy imports."""
    while isinstance(error, ImportError):
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


class _Report(logging.Handler):
    """Keeps the report that transformers logs before an error which only refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message without its colours."""
        self.text += re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())


@contextlib.contextmanager
def _conversion_errors() -> Iterator[None]:
    """Name the weights that could not be put together (the experts of a layer): transformers logs that, muted."""
    logger, report = logging.getLogger("transformers.modeling_utils"), _Report()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(report)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    except RuntimeError as error:
        match = re.search(r"^(\S+)\s*\| CONVERSION \|.*?([^\n]*)\nError", report.text, re.M | re.S)
        if match is None:
            raise
        raise RuntimeError(f"the stored weights do not make up '{match[1]}': {match[2][:_LONGEST]}") from error
    finally:
        logger.removeHandler(report)
        logger.setLevel(level)
        logger.propagate = propagates
