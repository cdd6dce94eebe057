"""What a command evaluates: a model as it is, with a method applied in memory, or read through a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longext.checkpoint.gguf import is_gguf
from longext.errors import ConfigError
from longext.settings import LENGTH

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel


def open_model(config: Any) -> LanguageModel:
    """Return the `LanguageModel` that `model`, `method`, `factor`, `memory` and `segment` of a config name.

    A .gguf file is run by llama.cpp.
    """
    # an evaluation whose settings are a plain `RuntimeConfig` has no method and no memory
    if getattr(config, "endpoint", None):
        from longext.models.engines.endpoint import open_endpoint

        return open_endpoint(config)
    method, factor = getattr(config, "method", None), getattr(config, "factor", None)
    if is_gguf(config.model):
        from longext.models.engines.llama_cpp import load_gguf_model

        return load_gguf_model(config, method, getattr(config, "memory", None))
    if getattr(config, "memory", None):
        from longext.compressor.reading.readers import load_reader

        return load_reader(config, config.memory, segment=config.segment, method=method, factor=factor)
    from longext.models.hf import load_language_model

    return load_language_model(config, method, factor)


def told_positions(model: LanguageModel) -> int:
    """Return how many positions a model has, without an end for a server that does not say: what notes go by."""
    try:
        return model.context_length
    except ConfigError:
        return LENGTH
