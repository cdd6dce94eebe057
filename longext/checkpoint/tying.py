"""Whether a model's output matrix is its input embedding: by what is stored, not by what config.json says.

A file may hold another output matrix although its config says `tie_word_embeddings`. transformers 5 keeps both then
(with a warning), readers that go by the flag (transformers 4, vLLM) drop the stored one. longext computes what
transformers 5 computes, says so, and writes a config that leaves no doubt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longext.checkpoint.weights import StoredTensor
from longext.errors import CheckpointError


def is_tied(model: Any) -> bool:
    """Return True if the loaded model's output matrix is its input embedding."""
    entry, exit_ = model.get_input_embeddings(), model.get_output_embeddings()
    return exit_ is not None and exit_.weight is entry.weight


def follow_weights(model: Any) -> None:
    """Make a loaded model's `tie_word_embeddings` say what its weights are: peft and accelerate go by the flag."""
    text = model.config.get_text_config()
    if not text.tie_word_embeddings or is_tied(model) or model.get_output_embeddings() is None:
        return
    warnings.warn(
        "config.json says tie_word_embeddings, but another output matrix is stored: both are used as they are, as "
        "transformers 5 does. Set it to false there, or drop that tensor, so that every reader computes the same.",
        stacklevel=2,
    )
    for config in (model.config, text):
        config.tie_word_embeddings = False


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a parsed config.json that says the output matrix is one of its own."""
    text = config.get("text_config")
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def stored_difference(
    tensors: Mapping[str, StoredTensor], embedding: str, head: str, says_tied: bool, base: Path
) -> float | None:
    """Return how far a stored output matrix is from the embedding that the config ties it to: 0 if they are one.

    Args:
        embedding, head: their names in the files.
        says_tied: what the config says.

    Returns:
        The largest |difference|, infinity for another shape; None if the config does not tie them.

    Raises:
        CheckpointError: a matrix is missing that the config promises.
    """
    if embedding not in tensors:
        only = f" (only '{head}')" if says_tied and head in tensors else ""
        raise CheckpointError(
            f"{base} holds no input embedding '{embedding}'{only}: load it with AutoModelForCausalLM.from_pretrained "
            "and save it again, or restore its files."
        )
    if not says_tied:
        if head not in tensors:
            raise CheckpointError(
                f"{base} lacks '{head}' (1 weight(s) missing), the model's output matrix. Restore its files, or set "
                "`tie_word_embeddings` to true in config.json if the embedding is that matrix."
            )
        return None
    if head not in tensors:
        return 0.0
    first, second = (tensors[name].read() for name in (embedding, head))
    if first.shape != second.shape:
        return float("inf")
    # a NaN is equal to nothing
    return 0.0 if bool((first == second).all()) else float((first.double() - second.double()).abs().max())
