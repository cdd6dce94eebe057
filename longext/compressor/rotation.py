"""Moving keys that are already rotated to other positions."""

from __future__ import annotations

import torch

from longext.compressor.backbone import Backbone, close_states
from longext.compressor.memory import Memory
from longext.errors import ConfigError


def rerotate(backbone: Backbone, memory: Memory, delta: int | torch.Tensor) -> Memory:
    """Return a `kv` memory whose keys are rotated by `delta` positions more (less, where negative); values as they are.

    RoPE turns pairs of dimensions by position times frequency, so a key at p becomes the key at p + delta; in float32
    at least. Temperature that a method puts into its rotation (YaRN) stays as it is.

    Args:
        delta: one number for all slots, or int64 [slots].
    """
    deltas = torch.as_tensor(delta).reshape(1, -1)
    if not memory or not bool(deltas.any()):
        return memory
    moved = list(memory)
    for layer, keys in enumerate(memory[::2]):
        by = deltas.to(keys.device)
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos, sin = (part[:, None] for part in backbone.rotation(wide[:1, 0], by.abs(), layer))
        length = (cos**2 + sin**2).sqrt()
        moved[2 * layer] = _turn(wide, cos / length, (sin / length) * by.sign()[:, None, :, None]).to(keys.dtype)
    return tuple(moved)


def _turn(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of keys [B, H, n, d], as many as `cos` has, pairing i with i + half."""
    size = cos.shape[-1]
    turned, rest = keys[..., :size], keys[..., size:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


@torch.no_grad()
def check_rotation(backbone: Backbone) -> None:
    """Raise ConfigError where `rerotate` is not how this family turns its keys (those that pair neighbours)."""
    tokens = torch.arange(4, device=backbone.device)[None]
    captured = backbone.attention_inputs(backbone.embed(tokens), slice(None))
    here, there = (backbone.project(captured, torch.arange(4, device=backbone.device)[None] + p) for p in (5, 0))
    moved = rerotate(backbone, here, -5)
    if not all(close_states(a, b) for a, b in zip(moved, there, strict=True)):
        raise ConfigError(
            f"{type(backbone.model).__name__} turns its keys in a way longext does not know, so caches that move "
            "(streaming, transformer-xl, a session beyond its window) cannot be used with it."
        )
