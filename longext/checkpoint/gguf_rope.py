"""The RoPE of a GGUF file as llama.cpp computes it: read out of its keys and tensors, and a new one as such.

llama.cpp rotates by `rope.freq_base` and one scaling of its own (linear, yarn). Where the graph of an architecture
reads the tensor `rope_freqs.weight`, frequencies are divided by it one by one, and `rope.scaling.attn_factor`
multiplies cos and sin: together they carry any frequencies and any temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longext.checkpoint.gguf import FLOAT32, STRING, UINT32, GgufFile, Value
from longext.checkpoint.rope_config import ModelRope
from longext.errors import CheckpointError, ConfigError
from longext.rope.formulas import base_inv_freq
from longext.rope.reading import read_parameters
from longext.rope.spec import ROPE_METHODS, RopeParameters, RopeSpec, compute_inv_freq, rope_parameters
from longext.settings import LENGTH

if TYPE_CHECKING:
    import numpy as np

# Read in the sources of llama.cpp that llama-cpp-python 0.3.36 is built from (src/models): every layer of these is
# rotated alike, by the keys of the file. The graphs of the first also read `rope_freqs.weight`.
READ_FREQS = frozenset("llama deci arcee apertus exaone granite".split())
READ_KEYS = READ_FREQS | frozenset(
    "qwen2 qwen2moe qwen3 qwen3moe gemma internlm2 starcoder2 stablelm phi2 gptneox olmo olmoe command-r deepseek "
    "dots1 ernie4_5 ernie4_5-moe seed_oss nemotron falcon xverse orion smollm3".split()
)
FREQS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_KINDS = ("none", "linear", "yarn", "longrope")
_SCALING = "type factor attn_factor original_context_length alpha yarn_log_multiplier"
_SCALING_KEYS = tuple(f"rope.scaling.{name}" for name in _SCALING.split()) + tuple(
    f"rope.scaling.yarn_{name}" for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")
)


@dataclass(frozen=True)
class GgufRope:
    """A RoPE as a file holds it: keys (None: none of that name) and tensors to add."""

    keys: dict[str, Value | None] = field(default_factory=dict)
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)


def read_gguf_rope(file: GgufFile) -> ModelRope:
    """Return the RoPE that llama.cpp computes for a file, in the form of a checkpoint's.

    Raises:
        CheckpointError: no RoPE in it, or keys that contradict each other.
    """
    architecture, length = file.architecture, _whole(file, "context_length")
    if length is None or (architecture not in READ_KEYS and not any(".rope." in key for key in file.values)):
        raise CheckpointError(
            f"{file.path} (architecture '{architecture or 'unknown'}') has no context_length or no RoPE to extend."
        )
    head_dim = _whole(file, "attention.key_length") or (_whole(file, "embedding_length") or 0) // _heads(file)
    rotary_dim = _whole(file, "rope.dimension_count") or head_dim
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise CheckpointError(f"{file.path} rotates {rotary_dim} of {head_dim} dimensions. Convert the model again.")
    parameters = _parameters(file, rotary_dim, length)
    return ModelRope(
        model_type=architecture,
        section=None,
        head_dim=head_dim,
        partial_rotary_factor=rotary_dim / head_dim,
        max_position_embeddings=length,
        parameters=parameters,
        spec=read_parameters(parameters, rotary_dim, length),
        sliding_window=_whole(file, "attention.sliding_window"),
    )


def _heads(file: GgufFile) -> int:
    key = "attention.head_count"
    each = [n for n in file.array(f"{file.architecture}.{key}") if type(n) is int and n > 0]  # one for each layer
    heads = max(each, default=None) or _whole(file, key)
    if not heads:
        raise CheckpointError(f"{file.path} does not say how many heads it has ({key}). Convert the model again.")
    return heads


def _whole(file: GgufFile, name: str) -> int | None:
    """Return a whole number above 0, None if the file has none (0 is how some files say so)."""
    value = _number(file, name)
    if value is None or (value == int(value) and value < LENGTH):
        return value if value is None else int(value)
    raise CheckpointError(f"{file.path}: {file.architecture}.{name} is {value}, not a whole number. Download it again.")


def _number(file: GgufFile, name: str) -> float | None:
    """Return a number above 0, None if the file has none."""
    value = file.get(name)
    if value is None or value == 0:
        return None
    if isinstance(value, str | bool) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{file.path}: {file.architecture}.{name} is {value!r:.40}, not a number above 0. Download it again."
        )
    return float(value)


def _parameters(file: GgufFile, rotary_dim: int, length: int) -> RopeParameters:
    """Return flat `rope_parameters`, as transformers would spell what the file says."""
    kind = str(file.get("rope.scaling.type", "linear"))
    if kind not in _KINDS:
        raise CheckpointError(
            f"{file.path}: rope.scaling.type is '{kind:.40}', which llama.cpp does not know ({', '.join(_KINDS)}). "
            "Convert the model again."
        )
    # the second name is that of files of 2023
    factor = _number(file, "rope.scaling.factor") or _number(file, "rope.scale_linear") or 1.0
    recorded = _whole(file, "rope.scaling.original_context_length")
    original = recorded or length
    temperature = _number(file, "rope.scaling.attn_factor")
    found: RopeParameters = {"rope_type": "default", "rope_theta": _number(file, "rope.freq_base") or 10000.0}
    if kind in ("linear", "longrope") and factor != 1:  # llama.cpp divides positions by it but for "none"
        found |= {"rope_type": "linear", "factor": factor}
        found |= {"original_max_position_embeddings": recorded} if recorded else {}
    if kind == "yarn":
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        betas = {key: _number(file, f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
        found |= {key: value for key, value in betas.items() if value is not None}
        if temperature is not None:  # llama.cpp multiplies YaRN's own by it
            own = compute_inv_freq(read_parameters(found, rotary_dim, length))[1]
            found["attention_factor"] = own * temperature
    factors = _stored_factors(file, rotary_dim)
    if temperature in (None, 1.0) and all(value == 1 for each in factors.values() for value in each):
        factors = {}
    if factors and found["rope_type"] != "default":
        raise CheckpointError(
            f"{file.path} holds factors of single frequencies beside '{kind}' scaling, which no method has. Convert "
            "the model again."
        )
    if not factors and temperature not in (None, 1.0) and kind != "yarn":
        raise CheckpointError(f"{file.path} has an attn_factor ({temperature:g}) without scaling: no method has that.")
    if not factors:
        return found
    return {
        **found,
        **factors,
        "rope_type": "longrope",
        "factor": max(1.0, length / original),
        "original_max_position_embeddings": original,
        "attention_factor": temperature or 1.0,
    }


def _stored_factors(file: GgufFile, rotary_dim: int) -> RopeParameters:
    """Return short and long divisors of each frequency, nothing for a file without any."""
    short, long = (FREQS, FREQS) if FREQS in file.tensors else (_SHORT, _LONG)
    if short not in file.tensors or long not in file.tensors:
        return {}
    lists = {"short_factor": file.floats(short).tolist(), "long_factor": file.floats(long).tolist()}
    if any(len(each) != rotary_dim // 2 or not all(0 < x < math.inf for x in each) for each in lists.values()):
        raise CheckpointError(f"{file.path}: '{long}' must hold {rotary_dim // 2} numbers above 0. Download it again.")
    return lists


def gguf_rope(file: GgufFile, spec: RopeSpec, length: int) -> GgufRope:
    """Return what a file of the architecture of `file` holds for `spec`, at a context length of `length`.

    Raises:
        ConfigError: llama.cpp cannot compute it for this architecture.
    """
    return rope_for(file.architecture, spec, length, replaced=_present(file))


def rope_for(architecture: str, spec: RopeSpec, length: int, replaced: tuple[str, ...] = ()) -> GgufRope:
    """Return the keys and tensors of `spec` for an architecture.

    Args:
        length: the context length to write.
        replaced: keys of another RoPE, to be left out.
    """
    _refuse(architecture, spec)
    parameters = rope_parameters(spec)
    keys: dict[str, Value | None] = {f"{architecture}.{name}": None for name in replaced}

    def put(name: str, kind: int, value: Any) -> None:
        keys[f"{architecture}.{name}"] = (kind, value)

    put("context_length", UINT32, length)
    put("rope.freq_base", FLOAT32, float(parameters["rope_theta"]))
    if parameters["rope_type"] == "default":
        return GgufRope(keys)
    put("rope.scaling.original_context_length", UINT32, spec.original_max_position_embeddings)
    if _has_own_scaling(parameters):
        put("rope.scaling.type", STRING, parameters["rope_type"])
        put("rope.scaling.factor", FLOAT32, float(parameters["factor"]))
        return GgufRope(keys)
    inv_freq, temperature = compute_inv_freq(spec)
    put("rope.freq_base", FLOAT32, spec.rope_theta)
    put("rope.scaling.type", STRING, "none")
    put("rope.scaling.attn_factor", FLOAT32, temperature)
    return GgufRope(keys, {FREQS: (base_inv_freq(spec) / inv_freq).astype("float32")})


def _has_own_scaling(parameters: RopeParameters) -> bool:
    """True for what llama.cpp computes by `rope.scaling.type`: of YaRN only its defaults (ramp, temperature)."""
    plain = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    return parameters["rope_type"] in ("linear", "yarn") and set(parameters) <= plain


def _refuse(architecture: str, spec: RopeSpec) -> None:
    if architecture not in READ_KEYS:
        raise ConfigError(
            f"llama.cpp's graph of '{architecture}' is not known to rotate every layer by the keys of the file. Those "
            f"of {', '.join(sorted(READ_KEYS))} do; of another, extend the checkpoint and convert that with llama.cpp."
        )
    parameters = rope_parameters(spec)
    method = ROPE_METHODS[spec.method]
    if method.follows_length and parameters.get("short_factor") != parameters.get("long_factor", ()):
        raise ConfigError(
            f"llama.cpp has one RoPE for every length of text, and `{spec.method}` follows it. Choose a static method "
            "(yarn, ntk, ...; longrope with equal short_factor and long_factor)."
        )
    by_keys = parameters["rope_type"] == "default" or _has_own_scaling(parameters)
    if architecture not in READ_FREQS and not by_keys:
        raise ConfigError(
            f"llama.cpp's graph of '{architecture}' reads no {FREQS}, which `{spec.method}` with these parameters "
            "needs. Choose abf, ntk, linear, or yarn with its defaults."
        )


def _present(file: GgufFile) -> tuple[str, ...]:
    return tuple(key for key in (*_SCALING_KEYS, "rope.scale_linear") if f"{file.architecture}.{key}" in file.entries)
