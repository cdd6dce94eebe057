"""What a command evaluates: a model as it is, with a method applied in memory, or read through a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longext.models.methods import is_unchanged, method_request

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel


def open_model(config: Any) -> Any:
    """Return the `LanguageModel` that `model`, `method`, `factor`, `memory` and `segment` of a config name.

    It is asked as the config says (a `ChatConfig`).
    """
    from longext.models.chat import check_asking, set_asking
    from longext.options import ChatConfig

    if isinstance(config, ChatConfig):
        check_asking(config)
    model = _load(config)
    if isinstance(config, ChatConfig):
        set_asking(model, config)
    return model


def context_length(model: LanguageModel, config: Any) -> int:
    """Return how many positions a model has, with the extension that the `method` of a config applied to it."""
    plain: Any = getattr(model, "plain", model)
    positions: int = plain.model.config.get_text_config().max_position_embeddings
    if config.method is None or is_unchanged(config.method):
        return positions
    request = method_request(config.method, config.model, factor=config.factor)
    return max(positions, request.target_length or 0, int(plain.trained_length * (request.factor or 1)))


def _load(config: Any) -> Any:
    # an evaluation whose settings are a plain `RuntimeConfig` has no method and no memory
    method, factor = getattr(config, "method", None), getattr(config, "factor", None)
    if getattr(config, "memory", None):
        from longext.compressor.readers import load_reader

        return load_reader(config, config.memory, segment=config.segment, method=method, factor=factor)
    from longext.models.hf import load_language_model

    return load_language_model(config, method, factor)
