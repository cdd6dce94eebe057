"""Learning from the same model with the whole text in view (context distillation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from longext.compressor.backbone import Backbone


def divergence(backbone: Backbone, student: torch.Tensor, teacher: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Return the sum over scored tokens of KL(teacher || student) in nats, a float32 scalar; logits a chunk at a time.

    Args:
        student, teacher: last hidden states [B, l, D] for the same tokens; the teacher's take no gradient.
        scored: bool [B, l].
    """
    ours, theirs = student[scored], teacher[scored]
    total = ours.sum() * 0.0
    for one, other in zip(ours.split(backbone.loss_chunk), theirs.split(backbone.loss_chunk), strict=True):
        total = total + checkpoint(_chunk, backbone, one, other, use_reentrant=False)
    return total.to(torch.promote_types(total.dtype, torch.float32))


def _chunk(backbone: Backbone, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(student.dtype, torch.float32)
    ours = F.log_softmax(backbone.logits(student).to(wide), -1)
    theirs = F.log_softmax(backbone.logits(teacher).detach().to(wide), -1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


@torch.no_grad()
def teacher_states(backbone: Backbone, tokens: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return the frozen model's last hidden states [B, stop - start, D] at tokens start .. stop.

    It reads as much of the text before them as its window holds, raw.

    Args:
        tokens: int64 [B, N], the whole documents.
    """
    first = max(0, stop - backbone.window)
    return backbone.run(backbone.embed(tokens[:, first:stop]))[:, start - stop :]
