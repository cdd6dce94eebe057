"""Keys and values of several prompts in one cache: joined, repeated, and rows taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from longext.models.hf import HFLanguageModel

Row = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of every layer, [1, K, n, D]


def grows(cache: Any) -> bool:
    """True for the cache of a model of full attention: every layer keeps every token, and nothing else."""
    from transformers.cache_utils import DynamicLayer

    layers: list[Any] = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)


def row_of(cache: Any) -> Row:
    """Return the keys and values of a cache that `grows`; what is read later leaves them as they are."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def join_rows(model: HFLanguageModel, rows: Sequence[Row], room: int) -> Any:
    """Return one cache of B rows [B, K, n, D] out of caches of one row, shorter ones padded with zeros on the left.

    A static cache where attention takes one: it is written in place, while a dynamic one is copied at every token.

    Args:
        room: tokens that will be written behind the prompts.
    """
    from torch.nn.functional import pad
    from transformers import DynamicCache, StaticCache

    longest = max(row[0][0].shape[2] for row in rows)
    text = model.model.config.get_text_config()
    is_static = text._attn_implementation in ("sdpa", "eager")
    cache: Any = StaticCache(config=text, max_cache_len=longest + room) if is_static else DynamicCache()
    for number, layer in enumerate(zip(*rows, strict=True)):
        keys, values = (
            torch.cat([pad(each[part], (0, 0, longest - each[part].shape[2], 0)) for each in layer]) for part in (0, 1)
        )
        cache.update(keys, values, number)
    return cache


def some_rows(cache: Any, index: torch.Tensor) -> Any:
    """Return a cache with these of its rows alone, int64 [n]; None for kinds that are not known to allow it."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

    kinds = {type(layer) for layer in getattr(cache, "layers", [None])}
    if kinds == {StaticLayer}:
        cache.reorder_cache(index)
        return cache
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    cache.batch_select_indices(index)
    return cache
