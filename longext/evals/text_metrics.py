"""How much of a text another text repeats: BLEU-4 and ROUGE-L over whitespace words, one reference, no smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]

_ORDER = 4  # n-grams of BLEU-4


@cache
def _sacrebleu() -> Any:
    from sacrebleu.metrics import BLEU  # type: ignore[attr-defined]

    return BLEU(smooth_method="none", tokenize="none", max_ngram_order=_ORDER, force=True)


def bleu_counts(hypothesis: Sequence[str], reference: Sequence[str]) -> Counts:
    """Return what BLEU-4 is made of, int64 [10]: clipped matches of 1- to 4-grams, n-grams, words of both texts.

    Counts of several texts add up: the sum over a corpus is what its BLEU is computed from (Papineni et al., 2002).
    """
    import numpy as np

    found = _sacrebleu().corpus_score([" ".join(hypothesis)], [[" ".join(reference)]])
    return np.array([*found.counts, *found.totals, found.sys_len, found.ref_len], dtype=np.int64)


def bleu(counts: Counts) -> float:
    """Return BLEU-4 (0 to 1) of `bleu_counts`: brevity penalty times the geometric mean of the precisions.

    Not smoothed: 0 if no n-gram of some order matches, so also for a hypothesis of fewer than four words.
    """
    matches, totals = counts[:_ORDER].tolist(), counts[_ORDER : 2 * _ORDER].tolist()
    lengths = counts[2 * _ORDER :].tolist()
    found = _sacrebleu().compute_bleu(matches, totals, *lengths, smooth_method="none")
    return min(1.0, float(found.score) / 100)  # its logarithms make 1 + 4e-16 of equal texts


def bootstrap_corpus_bleu(counts: Counts, *, num_samples: int, seed: int) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of the BLEU-4 of a corpus, resampling its texts [n, 10].

    None for fewer than two texts.
    """
    import numpy as np

    if num_samples < 1 or len(counts) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), num_samples)
    low, high = np.quantile([bleu(sums) for sums in drawn @ counts], [0.025, 0.975])
    return float(low), float(high)


def lcs_rows(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Return the table of longest common subsequences, one integer for each row (Hyyro, 2004).

    Of the lowest j bits of row i, as many are 0 as the longest common subsequence of first[:i] and second[:j] is long.
    """
    places: dict[str, int] = {}
    for j, word in enumerate(second):
        places[word] = places.get(word, 0) | 1 << j
    every = (1 << len(second)) - 1
    rows = [every]
    for word in first:
        row = rows[-1]
        shared = row & places.get(word, 0)
        rows.append(((row + shared) | (row - shared)) & every)
    return rows


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    return len(second) - lcs_rows(first, second)[-1].bit_count()


def rouge_l(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """Return ROUGE-L, the F1 of the longest common subsequence (Lin, 2004); 0 if either has no word."""
    if not hypothesis or not reference:
        return 0.0
    return 2 * longest_common_subsequence(hypothesis, reference) / (len(hypothesis) + len(reference))
