"""Tokens of texts of any length, in memory that grows with the tokens alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from longext.errors import DataError

_WINDOW = 1 << 17  # characters tokenised at a time; an encoding takes about 200 bytes a token while it is made
LONG = 2 * _WINDOW  # characters of a text that is cut into windows
_OVERLAP = 1 << 13  # characters that two windows share
_AGREED = 16  # tokens on either side of a seam that both windows must share


def encode_text(tokenizer: Any, text: str, max_tokens: int | None = None, **options: Any) -> list[int]:
    """Return the tokens of `text` without special ones put around it: those of one call of `tokenizer`.

    A long text is tokenised in windows that overlap. They are joined at a place with the same
    tokens on either side in both; if there is none, the text is tokenised as a whole after all.

    Args:
        max_tokens: return only the first `max_tokens`; what comes after them is not tokenised.
        options: of the tokenizer's call.

    Raises:
        DataError: a text that is none, as a command line in another encoding gives.
    """
    if len(text) <= 2 * _WINDOW or not getattr(tokenizer, "is_fast", False):
        return _plain(tokenizer, text, options)[:max_tokens]
    ids: list[int] = []
    numbers: dict[int, int] = {}  # one object for each token id: 8 bytes a token, not 36
    start, first = 0, 0
    window, offsets = with_offsets(tokenizer, text[:_WINDOW], options)
    while start + _WINDOW < len(text) and (max_tokens is None or len(ids) < max_tokens):
        next_start = start + _cut(offsets)
        following, next_offsets = with_offsets(tokenizer, text[next_start : next_start + _WINDOW], options)
        seam = _seam(window, offsets, following, next_offsets, next_start - start)
        if seam is None or next_start <= start:
            return _plain(tokenizer, text, options)[:max_tokens]
        ids.extend(map(numbers.setdefault, window[first : seam[0]], window[first : seam[0]]))
        start, first, window, offsets = next_start, seam[1], following, next_offsets
    ids.extend(map(numbers.setdefault, window[first:], window[first:]))
    if max_tokens is not None:
        del ids[max_tokens:]
    return ids


def _plain(tokenizer: Any, text: str, options: dict[str, Any]) -> list[int]:
    ids: list[int] = _encoded(tokenizer, text, options)["input_ids"]
    return ids


def with_offsets(
    tokenizer: Any, text: str, options: dict[str, Any] | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of `text` in one call of a fast tokenizer, and the characters that each stands for."""
    encoded = _encoded(tokenizer, text, {**(options or {}), "return_offsets_mapping": True})
    return encoded["input_ids"], encoded["offset_mapping"]


def _encoded(tokenizer: Any, text: str, options: dict[str, Any]) -> Any:
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except (TypeError, UnicodeError) as error:
        lone = next((place for place, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if lone is None:
            raise
        begin = text[:20].encode(errors="replace").decode()
        raise DataError(
            f"The text '{begin}...' is not UTF-8 (a byte or half a character at place {lone + 1:,}). Write it in UTF-8."
        ) from error


def _cut(offsets: Sequence[tuple[int, int]]) -> int:
    """Return where the next window starts: at the first token within `_OVERLAP` of this one's end."""
    return next((start for start, _ in offsets if start >= _WINDOW - _OVERLAP), 0)


def _seam(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    next_ids: Sequence[int],
    next_offsets: Sequence[tuple[int, int]],
    shift: int,
) -> tuple[int, int] | None:
    """Return (token of the first window, the same token in the next): the one nearest the middle of the overlap.

    Args:
        shift: characters from the first window's start to the next one's.
    """
    places: dict[int, int] = {}
    for j, (start, _) in enumerate(next_offsets):
        if start > _OVERLAP:
            break
        places.setdefault(start + shift, j)
    candidates = [
        (abs(start - shift - _OVERLAP // 2), i, places[start])
        for i, (start, _) in enumerate(offsets)
        if start >= shift and start in places
    ]
    for _, i, j in sorted(candidates):
        around = slice(max(0, i - _AGREED), i + _AGREED), slice(max(0, j - _AGREED), j + _AGREED)
        if min(i, j, len(ids) - i) >= _AGREED and ids[around[0]] == next_ids[around[1]]:
            return i, j
    return None


def control_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the ids of tokens that mean something to a model that is no text: BOS, EOS, markers of turns.

    The unknown token is none: it replaces characters.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return frozenset(marked - {token for token in (tokenizer.unk_token_id,) if token not in ends})


def count_controls(ids: Iterable[int], controls: frozenset[int]) -> int:
    """Return how many of `ids` are control tokens: a text that holds any spells them out."""
    return int(np.isin(np.fromiter(ids, dtype=np.int64), list(controls)).sum()) if controls else 0
