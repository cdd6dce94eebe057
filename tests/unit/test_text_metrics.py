"""BLEU-4 and ROUGE-L by hand, by slow counting in fractions, and by sacrebleu itself and rouge_score."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import sacrebleu

from longext.evals.text_metrics import (
    bleu,
    bleu_counts,
    bootstrap_corpus_bleu,
    longest_common_subsequence,
    rouge_l,
)


def random_pairs(count, seed=0, longest=14):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        lengths = rng.integers(1, longest, 2)
        yield tuple([f"w{i}" for i in rng.integers(0, 4, n)] for n in lengths)


def slow_bleu(pairs):
    """Corpus BLEU-4 by counting every n-gram in every position, precisions in fractions."""
    precisions = []
    for n in (1, 2, 3, 4):
        hits = total = 0
        for own, theirs in pairs:
            grams = [own[i : i + n] for i in range(len(own) - n + 1)]
            left = [theirs[i : i + n] for i in range(len(theirs) - n + 1)]
            total += len(grams)
            for gram in grams:
                if gram in left:
                    left.remove(gram)
                    hits += 1
        precisions.append(Fraction(hits, total) if total else Fraction(0))
    product = math.prod(precisions)
    own, theirs = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    return float(product) ** 0.25 * min(1.0, math.exp(1 - theirs / own))


def slow_lcs(first, second):
    """The longest of all subsequences of one text that the other has too."""
    for size in range(len(first), 0, -1):
        for chosen in itertools.combinations(first, size):
            rest = iter(second)
            if all(word in rest for word in chosen):
                return size
    return 0


def test_bleu_by_hand():
    reference = "the cat sat on the red mat today".split()
    hypothesis = "the cat sat on the mat".split()
    # 1-grams 6/6, 2-grams 4/5, 3-grams 3/4, 4-grams 2/3; 6 words for 8
    expected = (1 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25 * math.exp(1 - 8 / 6)
    assert bleu(bleu_counts(hypothesis, reference)) == pytest.approx(expected, rel=1e-12)


def test_a_repeated_word_counts_as_often_as_the_reference_has_it():
    # Papineni et al., 2002, example 2: modified unigram precision 2/7
    counts = bleu_counts(["the"] * 7, "the cat is on the mat".split())
    assert (counts[0], counts[4]) == (2, 7)


def test_bleu_equals_slow_counting():
    pairs = list(random_pairs(60))
    counts = np.stack([bleu_counts(*pair) for pair in pairs])
    assert bleu(counts.sum(0)) == pytest.approx(slow_bleu(pairs), rel=1e-12)
    scores = [bleu(own) for own in counts]
    assert scores == pytest.approx([slow_bleu([pair]) for pair in pairs], rel=1e-12, abs=0)
    assert any(scores)


def test_bleu_of_the_same_text_is_one_and_of_another_zero():
    same, other = "a b c d e".split(), "v w x y z".split()
    assert bleu(bleu_counts(same, same)) == 1.0
    assert bleu(bleu_counts(same, other)) == 0.0
    assert bleu(bleu_counts([], same)) == 0.0


def test_bleu_equals_sacrebleu():
    pairs = list(random_pairs(40, seed=1))
    texts = [(" ".join(own), " ".join(theirs)) for own, theirs in pairs]
    theirs = sacrebleu.corpus_bleu(
        [t[0] for t in texts], [[t[1] for t in texts]], smooth_method="none", tokenize="none"
    ).score
    assert 100 * bleu(sum(bleu_counts(*pair) for pair in pairs)) == pytest.approx(theirs, rel=1e-9)


def test_rouge_l_by_hand():
    # Lin, 2004, section 3: "police killed the gunman" and its summaries: recall = precision = 3/4 and 2/4
    reference = "police killed the gunman".split()
    assert rouge_l("police kill the gunman".split(), reference) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police".split(), reference) == pytest.approx(0.5)
    assert rouge_l("the gunman".split(), reference) == pytest.approx(2 / 3)
    assert rouge_l([], reference) == rouge_l(reference, []) == 0.0


def test_the_common_subsequence_equals_exhaustive_search():
    for own, theirs in random_pairs(80, seed=2, longest=10):
        assert longest_common_subsequence(own, theirs) == slow_lcs(own, theirs)


def test_rouge_l_equals_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for own, theirs in random_pairs(60, seed=3, longest=60):
        expected = scorer.score(" ".join(theirs), " ".join(own))["rougeL"].fmeasure
        assert rouge_l(own, theirs) == pytest.approx(expected, rel=1e-12)


def test_the_interval_is_seeded_and_holds_the_score():
    counts = np.stack([bleu_counts(*pair) for pair in random_pairs(60, seed=4)])
    interval = bootstrap_corpus_bleu(counts, num_samples=500, seed=0)
    assert interval == bootstrap_corpus_bleu(counts, num_samples=500, seed=0)
    assert interval[0] < bleu(counts.sum(0)) < interval[1]
    assert bootstrap_corpus_bleu(counts[:1], num_samples=500, seed=0) is None
