"""How much of a text another text repeats: BLEU-4 and ROUGE-L over whitespace words, one reference, no smoothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDER = 4  # n-grams of BLEU-4
Counts = NDArray[np.float64]


def words(text: str) -> list[str]:
    """Return the words of a text: what whitespace separates, case and punctuation kept."""
    return text.split()


def bleu_counts(hypothesis: Sequence[str], reference: Sequence[str]) -> Counts:
    """Return what BLEU-4 is made of, float64 [10]: clipped matches of 1- to 4-grams, n-grams, words of both texts.

    Counts of several texts add up: the sum over a corpus is what its BLEU is computed from (Papineni et al., 2002).
    """
    matches, totals = [], []
    for n in range(1, ORDER + 1):
        own, theirs = _ngrams(hypothesis, n), _ngrams(reference, n)
        matches.append(sum((own & theirs).values()))
        totals.append(sum(own.values()))
    return np.array([*matches, *totals, len(hypothesis), len(reference)], dtype=np.float64)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def bleu(counts: Counts) -> Counts:
    """Return BLEU-4 (0 to 1) of `bleu_counts` [..., 10]: brevity penalty times the geometric mean of the precisions.

    Not smoothed: 0 where no n-gram of some order matches, so also for a hypothesis of fewer than four words.
    """
    matches, totals = counts[..., :ORDER], counts[..., ORDER : 2 * ORDER]
    own, theirs = counts[..., -2], counts[..., -1]
    precisions = matches / np.maximum(totals, 1)
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(precisions).mean(-1))
    score: Counts = mean * np.exp(np.minimum(0.0, 1 - theirs / np.maximum(own, 1)))
    return score


def corpus_bleu(counts: Counts) -> float:
    """Return the BLEU-4 of a corpus from the `bleu_counts` of its texts [n, 10]."""
    return float(bleu(counts.sum(0)))


def bootstrap_corpus_bleu(counts: Counts, *, num_samples: int, seed: int) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of `corpus_bleu`, resampling texts; None for fewer than two."""
    if num_samples < 1 or len(counts) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), num_samples)
    low, high = np.quantile(bleu(drawn @ counts), [0.025, 0.975])
    return float(low), float(high)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, a row of the table in one integer (Hyyro, 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    every = row = (1 << len(first)) - 1
    for word in second:
        common = row & places.get(word, 0)
        row = ((row + common) | (row - common)) & every
    return len(first) - row.bit_count()


def rouge_l(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """Return ROUGE-L, the F1 of the longest common subsequence (Lin, 2004); 0 where either has no word."""
    if not hypothesis or not reference:
        return 0.0
    return 2 * longest_common_subsequence(hypothesis, reference) / (len(hypothesis) + len(reference))
