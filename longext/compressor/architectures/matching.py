"""as anchor, with values that start where attention matching's closed form puts them.

Attention matching (arXiv 2602.16284) for values alone: the keys of every ratio-th token stay, and their values C are
those with which queries that read the segment again get nearest to what they get of the whole of it,
softmax(Q K_kept') C ~ softmax(Q K') V, by least squares with a small ridge towards the raw values. Its biases are left
out: what the frozen reader reads is keys and values.

The fit depends on the frozen model and the text, and on nothing that is trained. So C - V is a constant that is added
to what the anchor writes: before training the memory is the closed form, and the gradient is the anchor's, exact.
"""

from __future__ import annotations

import torch

from longext.compressor.architectures import COMPRESSORS
from longext.compressor.architectures.anchor import Anchor
from longext.compressor.backbone import Backbone
from longext.compressor.independent import probe_positions
from longext.compressor.kv_policies.attention_matching import AttentionMatching
from longext.compressor.memory import Memory
from longext.compressor.reading.budgets import Budget
from longext.compressor.reading.eviction import PolicyTrail
from longext.compressor.reading.kv_memory import attends_by_interface
from longext.compressor.reading.seen import Seen
from longext.compressor.spec import CompressorSpec
from longext.errors import ConfigError


class _Moved(AttentionMatching):
    """Keeps every ratio-th key; in the place of values, how far the fit moves them."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def score(self, seen: Seen) -> torch.Tensor:
        """Return 1 for the keys that stay, else 0."""
        scores = torch.zeros_like(seen.text_keys[..., 0])
        scores[..., probe_positions(seen.num_keys, self.ratio) - 1] = 1.0
        return scores

    def fit(self, seen: Seen, index: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return fitted values less raw ones, and no bias."""
        fitted, _ = super().fit(seen, index, there)
        raw = seen.values.gather(-2, index[..., None].expand_as(fitted))
        return fitted - raw, torch.zeros_like(fitted[..., 0])

    def _weights(self, exp: torch.Tensor, total: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return start


class Matching(Anchor):
    """An anchor whose values are moved to the closed form; slots at another ratio are other ones, so none nest."""

    reference = "longext; after Attention Matching, arXiv 2602.16284"
    nested = False

    def __init__(self, backbone: Backbone, spec: CompressorSpec) -> None:
        super().__init__(backbone, spec)
        if 2 * spec.segment > backbone.window:
            raise ConfigError(
                f"--arch matching reads each segment of {spec.segment} tokens again behind itself, and the model has "
                f"{backbone.window} positions: give a --segment of at most {backbone.window // 2}."
            )
        if not attends_by_interface(backbone):
            raise ConfigError(
                f"{type(backbone.model).__name__} does not run its attention through transformers' attention "
                "interface, so --arch matching cannot see its queries: use --arch anchor."
            )

    def encode(self, tokens: torch.Tensor, ratio: int, first_slots: torch.Tensor) -> Memory:
        """Return the anchor's memories of R segments [R, l], their values moved."""
        memory = super().encode(tokens, ratio, first_slots)
        if ratio == 1:
            return memory
        moved = self._moved(tokens, ratio)
        return tuple(t + moved[i // 2].to(t.dtype) if i % 2 else t for i, t in enumerate(memory))

    @torch.no_grad()
    def _moved(self, tokens: torch.Tensor, ratio: int) -> list[torch.Tensor]:
        """Return how far the closed form moves the values of each layer, [R, H, l / ratio, d]."""
        count = tokens.shape[1] // ratio
        trail = PolicyTrail(self.backbone, _Moved(ratio), Budget(count, 0, count, len(self.backbone.layers)))
        with self.backbone.without_checkpointing():
            trail.write(tokens.clamp(min=0))  # the repeat token is trained: any other stands for it
        return [layer.held[1] for layer in trail.layers if layer.held is not None]


COMPRESSORS.register("matching", Matching)
