"""What a compressor learns from: next tokens, the text itself, answers, or the model with everything in view."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from longext.compressor.base import Compressor
from longext.compressor.gradients import Sweep, backprop
from longext.compressor.policies import TOKEN_OBJECTIVES, Policy, parse_policy
from longext.compressor.segments import Segment, reconstruction_segments, split_segments
from longext.data.long_short import longce_weights
from longext.training.losses import IGNORED


@dataclass(frozen=True)
class Batch:
    """One forward's rows and what decides their random choices.

    Attributes:
        tokens, labels: int64 [B, N] (labels not shifted).
        num_tokens: int64 [B], without padding.
        number: of the first row in the run.
        per_token: the gradient of a summed loss is multiplied by it.
        per_row: the same for what is averaged over the rows of a step.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    num_tokens: torch.Tensor
    number: int
    per_token: float
    per_row: float


@dataclass(frozen=True)
class Objectives:
    """Weighted objectives under one gradient policy."""

    weights: dict[str, float]
    policy: Policy
    seed: int
    fading: bool = False

    @property
    def of_tokens(self) -> tuple[float, float]:
        """Weights of cross-entropy and divergence in the pass that reads documents."""
        of_labels = next((self.weights[name] for name in TOKEN_OBJECTIVES if name in self.weights), 0.0)
        return of_labels, self.weights.get("distill", 0.0)

    def backward(self, compressor: Compressor, batch: Batch, group: Any = None) -> dict[str, torch.Tensor]:
        """Add the gradient of one batch; return the weighted and scaled parts of the loss, "documents" and "ae"."""
        # from the row's number alone: another number of processes or a resumed run draws the same
        rng = np.random.default_rng([self.seed, batch.number])
        ratios = rng.choice(compressor.spec.ratios, -(-batch.tokens.shape[1] // compressor.spec.segment)).tolist()
        parts: dict[str, torch.Tensor] = {}
        if any(self.of_tokens):
            fading = compressor.spec.ratios if self.fading else ()
            if fading:
                ratios = [fading[0]] * len(ratios)  # what a ratio further on keeps is part of it
            sweep = Sweep(self._segments(compressor, batch, ratios), compressor, batch.per_token, fading=fading)
            parts["documents"] = backprop(sweep, self.policy, rng, group) * batch.per_token
        if "ae" in self.weights:
            parts["ae"] = self._autoencode(compressor, batch, int(ratios[0]), rng)
        return parts

    def _segments(self, compressor: Compressor, batch: Batch, ratios: Sequence[int]) -> list[Segment]:
        segments = split_segments(batch.tokens, batch.labels, compressor.spec, ratios)
        last = max((t for t, s in enumerate(segments) if bool((s.labels != IGNORED).any())), default=0)
        segments = segments[: last + 1]  # padding is neither written nor read
        weights = self._label_weights(compressor, batch.tokens) if "longce" in self.weights else None
        taught: list[tuple[Segment, tuple[int, int]]] = []
        for t, segment in enumerate(segments):
            segment.weights = self.of_tokens
            start = t * compressor.spec.segment
            stop = start + segment.tokens.shape[1]
            segment.label_weights = None if weights is None else weights[:, start:stop]
            if self.of_tokens[1] and bool((segment.labels != IGNORED).any()):
                taught.append((segment, (start, stop)))
        states = compressor.backbone.teacher_states(batch.tokens, [span for _, span in taught])
        for (segment, _), teacher in zip(taught, states, strict=True):
            segment.teacher = teacher
        return segments

    def _label_weights(self, compressor: Compressor, tokens: torch.Tensor) -> torch.Tensor:
        """Return LongCE's weights [B, N] of aligned labels: far text is what a segment and its overlap do not hold."""
        gain = compressor.backbone.gain(tokens, compressor.spec.segment, compressor.spec.overlap)
        return F.pad(longce_weights(gain), (0, 1), value=1.0)

    def _autoencode(self, compressor: Compressor, batch: Batch, ratio: int, rng: np.random.Generator) -> torch.Tensor:
        """Reconstruct one whole segment of every row, chosen at random."""
        length = compressor.spec.segment
        chosen = []
        for row, count in zip(batch.tokens, batch.num_tokens.tolist(), strict=True):
            start = int(rng.integers(0, max(1, count // length))) * length
            chosen.append(row[start : start + length])
        segments = reconstruction_segments(torch.stack(chosen), ratio, compressor.spec.sink)
        scale = self.weights["ae"] * batch.per_row / int((segments[1].labels != IGNORED).sum())
        sweep = Sweep(segments, compressor, scale)
        # two segments: one graph is all there is, so the policy has nothing to weigh
        return backprop(sweep, parse_policy("full"), rng) * scale


def compare_gradients(
    compressor: Compressor, objectives: Objectives, batch: Batch, group: Any = None
) -> dict[str, float]:
    """Return how far the policy's gradient of one batch is from the exact one; the parameters' gradients are kept.

    For the exact policy itself the comparison is autograd through one graph of the whole document.

    Args:
        group: process group whose ranks share the documents; its gradients are added up first.

    Returns:
        cosine, relative_error |g - g*| / |g*| and norm_ratio |g| / |g*|.
    """
    other = parse_policy("full" if objectives.policy.name == "exact" else "exact")
    before = [parameter.grad for parameter in compressor.parameters()]
    estimate = _gradient(compressor, objectives, batch, group)
    # both draw from a generator of the same seed, so they compare the same ratios and segments
    exact = _gradient(compressor, dataclasses.replace(objectives, policy=other), batch, group)
    for parameter, gradient in zip(compressor.parameters(), before, strict=True):
        parameter.grad = gradient
    norm, exact_norm = estimate.norm(), exact.norm()
    return {
        "cosine": float(estimate @ exact / (norm * exact_norm)),
        "relative_error": float((estimate - exact).norm() / exact_norm),
        "norm_ratio": float(norm / exact_norm),
    }


def _gradient(compressor: Compressor, objectives: Objectives, batch: Batch, group: Any) -> torch.Tensor:
    for parameter in compressor.parameters():
        parameter.grad = None
    objectives.backward(compressor, batch, group)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in compressor.parameters()]
    # float64: float32 norms of so many terms would round away the differences that are measured
    gradient = torch.cat([part.flatten().double() for part in parts])
    if group is not None:
        dist.all_reduce(gradient, group=group)
    return gradient
