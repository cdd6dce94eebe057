"""Mixed windows (LongRoPE2, arXiv 2502.20082, section 3.3): one model, two RoPEs, chosen by the length of a document.

Shape legend: B rows, N tokens of a row, D rotary dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from longext.models.rotary import rotary_modules


@contextmanager
def rotated_by_document(model: Any, trained_length: int) -> Iterator[None]:
    """While open, a training forward of a `longrope` model rotates each document as if it were alone in the sequence.

    transformers takes short or long factors by the largest position of a whole batch. Here positions begin at 0 in each
    document of a row: one of up to `trained_length` tokens gets the short factors, a longer one the long factors. It is
    a forward hook on the rotary modules, so it works inside DDP, FSDP and PEFT wrappers.

    Args:
        model: a transformers causal LM (below PEFT) whose rope_type is longrope.
        trained_length: `original_max_position_embeddings` of its RoPE.
    """

    def rotate(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        positions = call.arguments["position_ids"]
        is_long = document_lengths(positions) > trained_length
        if not module.training or bool(is_long.all()) or not bool(is_long.any()):
            return None  # one window for the whole batch, which transformers finds by its largest position
        call.arguments["position_ids"] = positions.masked_fill(is_long, 0)
        # the module's own forward, not its call: hooks would run again
        short = module.forward(*call.args, **call.kwargs)
        return tuple(torch.where(is_long[..., None], *pair) for pair in zip(output, short, strict=True))

    handles = [module.register_forward_hook(rotate, with_kwargs=True) for module in rotary_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def document_lengths(positions: torch.Tensor) -> torch.Tensor:
    """Return for each token how many tokens its document has, int64 [B, N], from positions that begin at 0 in each."""
    begins = torch.zeros_like(positions)
    begins[..., 1:] = positions[..., 1:] != positions[..., :-1] + 1
    documents = begins.cumsum(-1)
    last = torch.zeros_like(positions).scatter_reduce(-1, documents, positions, "amax")
    return last.gather(-1, documents) + 1
