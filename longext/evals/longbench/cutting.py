"""Prompts that are too long lose their middle, as LongBench's authors cut them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel


def default_max_length(context: int) -> int:
    """Return the length that prompts are cut to: 1,000 for each 1,024 of the context less 500, as the authors' table.

    That is 3,500 for 4,096 positions, 15,500 for 16,384, 31,500 for 32,768; half of a small context.
    """
    return max(context // 1024 * 1000 - 500, context // 2)


def prompt_limit(model: LanguageModel, config: Any) -> int | None:
    """Return the length that prompts are cut to: --max-length, else by the context; a memory reads all (None)."""
    own: int | None = config.max_length
    return own if own is not None or config.memory else default_max_length(model.context_length)


def cut_middle(
    text: str, max_length: int | None, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> tuple[str, bool]:
    """Return the text, and whether it was longer than `max_length` tokens, BOS counted, and so lost its middle.

    What remains is the text of the first and of the last max_length // 2 tokens, put together as text: it is encoded
    again, so it may have a few tokens more or less, and an odd `max_length` loses one.
    """
    ids = encode(text)
    if max_length is None or len(ids) <= max_length:
        return text, False
    half = max_length // 2
    return decode(ids[:half]) + decode(ids[-half:]), True


def cut_prompt(model: LanguageModel, config: Any, text: str) -> tuple[str, bool]:
    """Return a prompt within `prompt_limit`, and whether it lost its middle."""
    return cut_middle(text, prompt_limit(model, config), model.encode, model.decode)
