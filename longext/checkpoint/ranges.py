"""What the values of a config.json can be: checked once, where the file is read, for every command.

Only what no model can have is refused here: a size of zero, a base that is no positive number, text in place of a
number. Which combinations are a RoPE that longext knows is decided by `rope_config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longext.checkpoint.families import FAMILIES
from longext.errors import CheckpointError
from longext.untrusted import shown

MAX_LENGTH = 2**31  # positions: far beyond any model, and what fits an index of 32 bits
MAX_FACTOR = 1e6  # target length / trained length
_SIZES = {  # key -> largest value; the least is 1
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**28,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": MAX_LENGTH,
    "original_max_position_embeddings": MAX_LENGTH,
    "qk_rope_head_dim": 2**16,
    "n_embd": 2**20,
    "n_head": 2**16,
    "n_layer": 10_000,
    "n_positions": MAX_LENGTH,
}
_BY_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads")  # some families have a list of them
_BASES = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "local_rope_theta", "global_rope_theta")
_LARGEST_BASE = 1e30
_SHARES = ("partial_rotary_factor", "rotary_pct")
_ABOVE_ZERO = ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
_FINITE = ("mscale", "mscale_all_dim", "short_mscale", "long_mscale", "alpha", "llama_4_scaling_beta")
_NEEDS_FACTOR = ("linear", "dynamic", "yarn", "llama3")
_TYPES: dict[str, tuple[type, str]] = {
    "model_type": (str, "text"),
    "architectures": (list, "a list"),
    "layer_types": (list, "a list"),
    "text_config": (dict, "an object"),
    "rope_parameters": (dict, "an object"),
    "rope_scaling": (dict, "an object"),
    "auto_map": (dict, "an object"),
    "tie_word_embeddings": (bool, "true or false"),
}
_DERIVE_HEAD_DIM = tuple(name for name, family in FAMILIES.items() if not family.omits_head_dim)
_ADVICE = "Restore the file from the original model."


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


def _check_level(level: Mapping[str, Any], where: str) -> None:
    for key, (wanted, spelled) in _TYPES.items():
        if level.get(key) is not None and not isinstance(level[key], wanted):
            raise _refusal(where, key, level[key], spelled)
    for key in ("architectures", "layer_types"):
        if not all(isinstance(item, str) for item in level.get(key) or ()):
            raise _refusal(where, key, level[key], "a list of text")
    one_for_all = level.get("model_type") in _DERIVE_HEAD_DIM
    for key, most in _SIZES.items():
        if isinstance(level.get(key), list) and (one_for_all or key not in _BY_LAYER):
            raise _refusal(where, key, level[key], f"a whole number from 1 to {most}")
        _check_size(level.get(key), key, most, where)
    for key in _BASES:
        if isinstance(level.get(key), list) and one_for_all:
            raise _refusal(where, key, level[key], "a number above 0")
    _check_numbers(level, where)
    for name, rope in _ropes(level):
        _check_rope(rope, level, f"{where}: {name}")
    _check_heads(level, where)


def _check_size(value: Any, key: str, most: int, where: str) -> None:
    for own in value if isinstance(value, list) else [value]:
        if own is not None and (isinstance(own, bool) or not isinstance(own, int) or not 1 <= own <= most):
            raise _refusal(where, key, own, f"a whole number from 1 to {most}")


def _check_numbers(level: Mapping[str, Any], where: str) -> None:
    for key in _BASES:
        for own in level[key] if isinstance(level.get(key), list) else [level.get(key)]:
            if own is not None and not (_is_number(own) and 0 < own <= _LARGEST_BASE):
                raise _refusal(where, key, own, "a number above 0")
    for key in _SHARES:
        own = level.get(key)
        if own is not None and not (_is_number(own) and 0 < own <= 1):
            raise _refusal(where, key, own, "a number above 0 and at most 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _ropes(level: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, flat dict) of every RoPE: of all layers, or one for each layer type."""
    for key in ("rope_parameters", "rope_scaling"):
        found = level.get(key) or {}
        nested = {kind: own for kind, own in found.items() if isinstance(own, dict)}
        if nested and not {"rope_type", "type"} & set(found):
            yield from ((f"{key}.{kind}", own) for kind, own in nested.items())
        elif found:
            yield key, found


def _check_rope(rope: Mapping[str, Any], level: Mapping[str, Any], where: str) -> None:
    for key in ("rope_type", "type"):
        if rope.get(key) is not None and not isinstance(rope[key], str):
            raise _refusal(where, key, rope[key], "text")
    _check_numbers(rope, where)
    for key in _ABOVE_ZERO:
        own = rope.get(key)
        most = MAX_FACTOR if key == "factor" else _LARGEST_BASE
        if own is not None and not (_is_number(own) and 0 < own <= most):
            raise _refusal(where, key, own, f"a number above 0 and at most {most:g}")
    for key in _FINITE:
        if rope.get(key) is not None and not _is_number(rope[key]):
            raise _refusal(where, key, rope[key], "a number")
    original = "original_max_position_embeddings"
    _check_size(rope.get(original), original, MAX_LENGTH, where)
    for key in ("short_factor", "long_factor"):
        own = rope.get(key)
        if own is not None and not (isinstance(own, list) and own and all(_is_number(x) and x > 0 for x in own)):
            raise _refusal(where, key, own, "a list of numbers above 0")
    kind = rope.get("rope_type") or rope.get("type")
    derived = kind == "yarn" and "factor" in rope and (rope.get(original) or level.get(original))
    if kind in _NEEDS_FACTOR and rope.get("factor") is None and not derived and "long_factor" not in rope:
        raise CheckpointError(f"{where}: a RoPE of type '{kind}' needs a `factor`, and there is none. {_ADVICE}")


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
        share = next((own[key] for key in _SHARES for own in (level, parameters) if _is_number(own.get(key))), 1.0)
        if int(head_dim * share) % 2 or head_dim % 2 or int(head_dim * share) < 2:
            raise _refusal(where, "head_dim", head_dim, "an even number of which an even part is rotated")


def _refusal(where: str, key: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"{where}: `{key}` must be {allowed}, found {shown(value)}. {_ADVICE}")
