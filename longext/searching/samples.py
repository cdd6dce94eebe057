"""What candidates are tried on: long texts with a number hidden in them, and short texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longext.data.documents import Document
from longext.errors import DataError
from longext.evals.passkey_prompts import NEEDLE, QUESTION, TASK, PromptTokens, exact_prompt
from longext.models.protocol import LanguageModel
from longext.searching.config import SearchConfig

_REPEATED = 48  # tokens of a passage that fills a sample by itself
_NUM_SHORT = 8


@dataclass(frozen=True)
class Sample:
    """A text of the target length that ends with a question for a number in it.

    Attributes:
        input_ids: int64 [1, T], the answer included.
        first: the first token that is scored: T / 2, or the answer's first.
        num_answer: tokens of the answer.
        text: which scored tokens are the user's text, bool [T - first]; None of a passage that repeats itself.
    """

    input_ids: torch.Tensor
    first: int
    num_answer: int
    text: torch.Tensor | None


def split_documents(documents: Sequence[Document], others: Sequence[Document] | None) -> tuple[list[Document], ...]:
    """Return (documents to search on, documents to judge on).

    Without `others` to judge on, every third document is kept back; of a single one, its last third.
    """
    if others is not None:
        return list(documents), list(others)
    if len(documents) > 1:
        held = range(2, len(documents), 3) or range(1, 2)  # by number: documents may be alike
        return [each for n, each in enumerate(documents) if n not in held], [documents[n] for n in held]
    (only,) = documents
    cut = 2 * len(only.text) // 3
    return [Document(only.id, only.text[:cut])], [Document(f"{only.id}, last third", only.text[cut:])]


def make_samples(
    model: LanguageModel, documents: Sequence[Document], length: int, config: SearchConfig
) -> list[Sample]:
    """Return `num_samples` samples: documents in turn, depths stratified, every second one a passage repeated.

    A text that repeats itself is the harder haystack: all its sentences match one another.

    Raises:
        DataError: no document has `length` tokens.
    """
    tokens = PromptTokens(lambda text: model.encode(text, add_bos=False), model.prefix)
    texts = [model.encode(document.text, add_bos=False)[: config.max_tokens] for document in documents]
    long_texts = [text for text in texts if len(text) >= length]
    if not long_texts:
        raise DataError(
            f"No document of {config.data} has {length} tokens to search on: the longest has {max(map(len, texts))}. "
            "Give longer documents with --data, or a shorter --target-length."
        )
    rng = np.random.default_rng([config.seed, length])
    depths = rng.permutation((np.arange(config.num_samples) + rng.random(config.num_samples)) / config.num_samples)
    samples = []
    for number, depth in enumerate(depths):
        text = long_texts[number // 2 % len(long_texts)]
        start = int(rng.integers(0, len(text) - length + 1))
        filler, repeats = text[start : start + length], number % 2 == 1
        if repeats:
            passage = filler[:_REPEATED]
            filler = (passage * (length // len(passage) + 1))[:length]
        seed = int(rng.integers(2**31))
        samples.append(_sample(tokens, filler, length, float(depth), seed, repeats=repeats))
    return samples


def _sample(
    tokens: PromptTokens, filler: Sequence[int], length: int, depth: float, seed: int, *, repeats: bool
) -> Sample:
    prompt = exact_prompt(tokens, filler, length=length, depth=depth, seed=seed)
    ids, num_answer = torch.tensor([[*prompt.input_ids, *prompt.answer_ids]]), len(prompt.answer_ids)
    if repeats:
        return Sample(ids, length - num_answer, num_answer, None)
    head = len(tokens.prefix) + len(tokens.encode(f"{TASK}\n"))
    end = len(prompt.input_ids) - len(tokens.encode(f"\n{QUESTION}"))
    num_needle = len(tokens.encode(f"\n{NEEDLE.format(key=prompt.key)}\n"))
    begin = head + round(depth * (end - head - num_needle))
    is_text = torch.zeros(length, dtype=torch.bool)
    is_text[head:begin] = is_text[begin + num_needle : end] = True
    first = length // 2
    return Sample(ids, first, num_answer, is_text[first:])


def short_windows(model: LanguageModel, documents: Sequence[Document], config: SearchConfig) -> torch.Tensor:
    """Return windows of the trained length from the middle of documents in turn, int64 [n, L].

    Raises:
        DataError: no document fills one.
    """
    length = config.original_length or model.trained_length
    texts = [model.encode(document.text, add_bos=False) for document in documents]
    places = [(text, start) for text in texts for start in range(0, len(text) - length + 1, length)]
    if not places:
        raise DataError(f"No document of {config.data} has {length} tokens.")
    chosen = np.random.default_rng([config.seed, 1]).permutation(len(places))[:_NUM_SHORT]
    begin = list(model.prefix)
    rows = [[*begin, *places[i][0][places[i][1] :]][:length] for i in chosen]
    return torch.tensor(rows)
