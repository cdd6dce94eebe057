"""Cross-entropy without the logits: the output head runs over a chunk of tokens at a time.

At 100k tokens and a vocabulary of 128k, logits and their gradient take 102 GB in float32; here a chunk's worth lives at
a time, forward and backward. The loss equals `F.cross_entropy(head(hidden).float(), labels)`.

Shape legend: B rows, N tokens of a row, T labelled tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from longext.models.head import decoder_of, scale_logits

IGNORED = -100
LABEL_WEIGHTS = "weights_of_labels"  # forward argument of a model under `chunked_loss`, beside its labels
_LOGITS_BYTES, _FEWEST, _MOST = 2**29, 128, 4096  # of a chunk by default
_WORTH_SELECTING = 0.9  # below this share of labelled tokens, they are copied out first
Head = Callable[[torch.Tensor], torch.Tensor]


def chunk_for(vocabulary: int) -> int:
    """Return the tokens per head call if nothing is said: 512 MiB of float32 logits, in steps of 128, 128 to 4,096."""
    fitting = _LOGITS_BYTES // (4 * vocabulary) // _FEWEST * _FEWEST
    return min(max(fitting, _FEWEST), _MOST)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    parameters: list[nn.Parameter],
    chunk: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the summed cross-entropy, a float32 scalar (float64 for float64 hidden states).

    The gradients of a chunk are computed right after its logits, so that no logits are kept and none is computed twice.

    Args:
        hidden: [T, D], what the head reads.
        labels: int64 [T]; tokens with -100 count nothing, and if there are many the head does not run over them.
        head: [t, D] -> logits [t, V].
        parameters: the head's parameters that are trained (their gradients are summed over chunks).
        chunk: tokens per head call.
        weights: [T], each token's loss is multiplied by its own; None for a plain sum. They take no gradient.
    """
    labelled = labels != IGNORED
    if int(labelled.sum()) < _WORTH_SELECTING * len(labels):  # else a copy of all hidden states would buy nothing
        hidden, labels = hidden[labelled], labels[labelled]
        weights = None if weights is None else weights[labelled]
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return _recomputed(hidden, labels, head, chunk, weights)  # DeepSpeed ZeRO-3 gathers weights per module call
    loss: torch.Tensor = _ChunkedLoss.apply(hidden, labels, weights, head, chunk, *parameters)
    return loss


def _sum_loss(hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, head: Head) -> torch.Tensor:
    logits = head(hidden)
    wide = logits.to(_at_least_float32(logits))
    if weights is None:
        return F.cross_entropy(wide, labels, reduction="sum", ignore_index=IGNORED)
    return F.cross_entropy(wide, labels, reduction="none", ignore_index=IGNORED) @ weights.to(wide.dtype)


def _part(weights: torch.Tensor | None, start: int, chunk: int) -> torch.Tensor | None:
    return None if weights is None else weights[start : start + chunk]


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _recomputed(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The same by activation checkpointing: logits are computed twice."""
    total = hidden.sum() * 0.0  # keeps the graph if nothing is labelled: all processes of DDP need a gradient
    for number, (states, targets) in enumerate(zip(hidden.split(chunk), labels.split(chunk), strict=True)):
        own = _part(weights, number * chunk, chunk)
        total = total + checkpoint(_sum_loss, states, targets, own, head, use_reentrant=False)
    return total.to(_at_least_float32(total))


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the loss and its gradients chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None,
        head: Head,
        chunk: int,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        """Sum the loss over chunks, and keep its gradients."""
        trained = [p for p in parameters if p.requires_grad]
        wants_hidden = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=_at_least_float32(hidden), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        sums: list[torch.Tensor | None] = [None] * len(trained)
        for start in range(0, len(labels), chunk):
            states = hidden[start : start + chunk].detach().requires_grad_(wants_hidden)
            with torch.enable_grad():
                loss = _sum_loss(states, labels[start : start + chunk], _part(weights, start, chunk), head)
            total += loss.detach()  # at least float32: half precision loses a chunk against a large sum
            inputs = [*([states] if wants_hidden else []), *trained]
            if not inputs:
                continue
            gradients = list(torch.autograd.grad(loss, inputs))
            if hidden_gradient is not None:
                hidden_gradient[start : start + chunk] = gradients.pop(0)
            # the first chunk's gradient is the buffer of the others: no copy of a whole head of zeros
            sums = [g if s is None else s.add_(g) for s, g in zip(sums, gradients, strict=True)]
        # attributes, not save_for_backward: backward scales these in place, once
        ctx.gradients = (hidden_gradient, iter(sums), [p.requires_grad for p in parameters])
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        """Scale the labelled gradients by the one that arrives."""
        hidden_gradient, sums, is_trained = ctx.gradients
        scale = outputs[0]
        ours = [next(sums) if trained else None for trained in is_trained]
        scaled = [None if g is None else g.mul_(scale) for g in (hidden_gradient, *ours)]
        return (scaled[0], None, None, None, None, *scaled[1:])


@dataclass
class _Call:
    """What one forward passes from hook to hook."""

    shift_labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    num_items: Any = None
    hidden: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def chunked_loss(model: Any, chunk: int) -> Iterator[None]:
    """While open, a training forward of `model` with labels makes its loss in chunks and no logits.

    Three forward hooks, no patched method: one takes the labels away and asks for zero logits, one keeps the decoder's
    output, one puts the loss into the model's output. Being inside the model's call, it works under DDP, FSDP and PEFT.

    The forward takes `labels` [B, N] (shifted here) or `shift_labels` [B, N] (already aligned), and
    `num_items_in_batch`, which divides the sum; without it the mean over labelled tokens is returned. It may take
    `LABEL_WEIGHTS` [B, N], aligned, too: they multiply each token's loss and do not change what divides the sum.

    Args:
        model: a transformers causal LM (below PEFT), for which `head_is_plain` holds.
        chunk: tokens per head call.
    """
    call = _Call()
    handles = [
        model.register_forward_pre_hook(_before(call), with_kwargs=True),
        decoder_of(model).register_forward_hook(lambda _, __, output: _keep_hidden(call, output)),
        model.register_forward_hook(lambda module, _, output: _after(call, module, output, chunk)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shift(labels: torch.Tensor) -> torch.Tensor:
    """Return labels [B, N] moved one position to the left, so that label t belongs to the output at t."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _before(call: _Call) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call.shift_labels, call.hidden = None, []
        if not module.training or ("labels" not in kwargs and "shift_labels" not in kwargs):
            return None
        labels = kwargs.pop("labels", None)
        shifted = kwargs.pop("shift_labels", None)
        call.shift_labels = shift(labels) if shifted is None else shifted
        call.num_items = kwargs.pop("num_items_in_batch", None)
        call.weights = kwargs.pop(LABEL_WEIGHTS, None)
        # an empty index: the model's own head runs over no token, whatever the vocabulary
        nothing = torch.empty(0, dtype=torch.int64, device=call.shift_labels.device)
        return args, {**kwargs, "logits_to_keep": nothing}

    return hook


def _keep_hidden(call: _Call, output: Any) -> None:
    if call.shift_labels is not None:
        call.hidden = [output[0]]


def _after(call: _Call, model: Any, output: Any, chunk: int) -> Any:
    if call.shift_labels is None:
        return None
    (hidden,), labels = call.hidden, call.shift_labels.reshape(-1)
    weights = None if call.weights is None else call.weights.reshape(-1)
    call.shift_labels, call.hidden, call.weights = None, [], None
    module = model.get_output_embeddings()

    def head(states: torch.Tensor) -> torch.Tensor:
        return scale_logits(model, module(states))

    flat = hidden.reshape(-1, hidden.shape[-1])
    trained = [p for p in module.parameters() if p.requires_grad]
    total = chunked_cross_entropy(flat, labels, head, trained, chunk, weights)
    count = call.num_items if call.num_items is not None else (labels != IGNORED).sum()
    output["loss"] = total / count
    return output
