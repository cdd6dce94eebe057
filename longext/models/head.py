"""From hidden states to logits, so that a caller can run the output head over a few positions at a time."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from longext.checkpoint.checks import embedding_rows
from longext.errors import LongextWarning


def decoder_of(model: Any) -> Any:
    """Return the module whose `last_hidden_state` the output head of a causal LM reads."""
    decoder = model.get_decoder()
    return decoder if decoder is not model else model.base_model


def scale_logits(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """Apply what some families do to logits after the output matrix (Gemma soft cap, Cohere and Granite scale)."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    return logits


@torch.no_grad()
def head_is_plain(model: Any) -> bool:
    """True if decoder + head + `scale_logits` give the model's own logits; checked on a few tokens.

    Warns if not: the caller then has to let the model make all its logits at once.
    """
    ids = (torch.arange(8, device=model.device) % embedding_rows(model))[None]
    try:
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        ours = scale_logits(model, model.get_output_embeddings()(hidden)).float()
    except (AttributeError, TypeError):
        ours = None
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    if (
        ours is not None
        and ours.shape == theirs.shape
        and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)
    ):
        return True
    warnings.warn(
        f"{type(model).__name__} changes its logits in a way longext does not know: "
        "using its own output path, which needs memory for all logits at once.",
        LongextWarning,
        stacklevel=2,
    )
    return False
