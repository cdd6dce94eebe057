"""What the values of a config.json can be: checked once, where the file is read, for every command.

Only what no model can have is refused here: a size of zero, a base that is no positive number, text in place of a
number. Which combinations are a RoPE that longext knows is decided by `rope_config`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longext.checkpoint.families import FAMILIES
from longext.errors import CheckpointError
from longext.untrusted import shown

MAX_LENGTH = 2**31  # positions: far beyond any model, and what fits an index of 32 bits
MAX_FACTOR = 1e6  # target length / trained length
_LARGEST = 1e30
_COUNT = re.compile(r"(^|_)(n_)?(layers?|labels)$")
_MOST = 100_000
_ADVICE = "Restore the file from the original model."
_SHARES = ("partial_rotary_factor", "rotary_pct")
_NEEDS_FACTOR = ("linear", "dynamic", "yarn", "llama3")
_DERIVE_HEAD_DIM = tuple(name for name, family in FAMILIES.items() if not family.omits_head_dim)


class _Rule(NamedTuple):
    """What a value that is not null must be, as a test and in words."""

    fits: Callable[[Any], bool]
    allowed: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _size(most: int) -> _Rule:
    return _Rule(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most,
        f"a whole number from 1 to {most}",
    )


def _above_zero(most: float, allowed: str) -> _Rule:
    return _Rule(lambda value: _is_number(value) and 0 < value <= most, allowed)


_TEXT = _Rule(lambda value: isinstance(value, str), "text")
_OBJECT = _Rule(lambda value: isinstance(value, dict), "an object")
_TEXTS = _Rule(lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value), "a list of text")
_BASE = _above_zero(_LARGEST, "a number above 0")
_SHARE = _above_zero(1, "a number above 0 and at most 1")
_POSITIVES = _Rule(
    lambda value: isinstance(value, list) and bool(value) and all(_is_number(x) and x > 0 for x in value),
    "a list of numbers above 0",
)
_BASES = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "local_rope_theta", "global_rope_theta")
_NUMBERS = {**dict.fromkeys(_BASES, _BASE), **dict.fromkeys(_SHARES, _SHARE)}
_ABOVE_ZERO = ("attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
_FINITE = ("mscale", "mscale_all_dim", "short_mscale", "long_mscale", "alpha", "llama_4_scaling_beta")
_ORIGINAL = "original_max_position_embeddings"
_LEVEL = {
    "model_type": _TEXT,
    **dict.fromkeys(("architectures", "layer_types"), _TEXTS),
    **dict.fromkeys(("text_config", "rope_parameters", "rope_scaling", "auto_map"), _OBJECT),
    "tie_word_embeddings": _Rule(lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), _size(2**16)),
    "qk_rope_head_dim": _size(2**16),
    **dict.fromkeys(("hidden_size", "n_embd"), _size(2**20)),
    "intermediate_size": _size(2**24),
    "vocab_size": _size(2**28),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), _size(10_000)),
    **dict.fromkeys(("max_position_embeddings", _ORIGINAL, "n_positions"), _size(MAX_LENGTH)),
    **_NUMBERS,
}
_ROPE = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    **_NUMBERS,
    "factor": _above_zero(MAX_FACTOR, f"a number above 0 and at most {MAX_FACTOR:g}"),
    **dict.fromkeys(_ABOVE_ZERO, _above_zero(_LARGEST, f"a number above 0 and at most {_LARGEST:g}")),
    **dict.fromkeys(_FINITE, _Rule(_is_number, "a number")),
    _ORIGINAL: _size(MAX_LENGTH),
    **dict.fromkeys(("short_factor", "long_factor"), _POSITIVES),
}
# Some families have one of each layer; those of `_DERIVE_HEAD_DIM` have one of all.
_BY_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads", *_BASES)


def check_model_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse values that no model can have, in the top level, `text_config` and every RoPE in them.

    Args:
        config: a parsed config.json.
        path: the file, for messages.

    Raises:
        CheckpointError: names the key, what was found and what it may be.
    """
    _check_level(config, str(path))
    text = config.get("text_config")
    if isinstance(text, dict):
        _check_level(text, f"{path}: text_config")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        # config classes list something for each layer or label, whatever family's: too many fill the memory
        counts = ((key, value) for key, value in section.items() if _COUNT.search(key) and isinstance(value, int))
        for key, value in counts:
            if value > _MOST:
                raise _refusal(str(path), key, value, f"at most {_MOST:,}")


def _check_level(level: Mapping[str, Any], where: str) -> None:
    _check_values(level, _LEVEL, () if level.get("model_type") in _DERIVE_HEAD_DIM else _BY_LAYER, where)
    for name, rope in _ropes(level):
        _check_values(rope, _ROPE, _BASES, f"{where}: {name}")
        kind = rope.get("rope_type") or rope.get("type")
        derived = kind == "yarn" and "factor" in rope and (rope.get(_ORIGINAL) or level.get(_ORIGINAL))
        if kind in _NEEDS_FACTOR and rope.get("factor") is None and not derived and "long_factor" not in rope:
            raise CheckpointError(
                f"{where}: {name}: a RoPE of type '{kind}' needs a `factor`, and there is none. {_ADVICE}"
            )
    _check_heads(level, where)


def _check_values(values: Mapping[str, Any], rules: Mapping[str, _Rule], listed: tuple[str, ...], where: str) -> None:
    """Refuse a value that does not fit its rule; a key of `listed` may have a list of such values."""
    for key, rule in rules.items():
        value = values.get(key)
        for item in value if isinstance(value, list) and key in listed else [value]:
            if item is not None and not rule.fits(item):
                raise _refusal(where, key, item, rule.allowed)


def _ropes(level: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, flat dict) of every RoPE: of all layers, or one for each layer type."""
    for key in ("rope_parameters", "rope_scaling"):
        section = level.get(key) or {}
        nested = {kind: rope for kind, rope in section.items() if isinstance(rope, dict)}
        if nested and not {"rope_type", "type"} & set(section):
            yield from ((f"{key}.{kind}", rope) for kind, rope in nested.items())
        elif section:
            yield key, section


def _check_heads(level: Mapping[str, Any], where: str) -> None:
    """Refuse heads that cannot be rotated in pairs or shared in groups."""
    heads, groups = level.get("num_attention_heads"), level.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise _refusal(where, "num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
    hidden, head_dim = level.get("hidden_size"), level.get("head_dim")
    if (
        head_dim is None
        and level.get("model_type") in _DERIVE_HEAD_DIM
        and isinstance(heads, int)
        and isinstance(hidden, int)
    ):
        if hidden % heads:
            raise _refusal(where, "hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
        head_dim = hidden // heads
    if isinstance(head_dim, int):
        parameters = level.get("rope_parameters") or {}
        share = next(
            (values[key] for key in _SHARES for values in (level, parameters) if _is_number(values.get(key))), 1.0
        )
        if int(head_dim * share) % 2 or head_dim % 2 or int(head_dim * share) < 2:
            raise _refusal(where, "head_dim", head_dim, "an even number of which an even part is rotated")


def _refusal(where: str, key: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"{where}: `{key}` must be {allowed}, found {shown(value)}. {_ADVICE}")
