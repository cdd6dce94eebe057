"""LongBench's metrics against values worked out by hand."""

from __future__ import annotations

import sys

import pytest

from longext.errors import MissingExtraError
from longext.evals.longbench import metrics
from longext.evals.longbench.metrics import METRICS


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The cat, sat!", "a cat sat", 1.0),  # case, punctuation and articles do not count
        ("cat sat down", "the cat", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("red red blue", "red blue blue", 2 / 3),  # two common, of a bag of three each
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "an", 0.0),  # nothing is left of either
        ("well-known", "wellknown", 1.0),
    ],
)
def test_qa_f1(prediction, reference, expected):
    assert metrics.qa_f1(prediction, reference) == pytest.approx(expected, abs=1e-12)


def rouge_f(common, own, theirs):
    p, r = common / own, common / theirs
    return 2 * p * r / (p + r + 1e-8)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", rouge_f(3, 3, 3)),
        ("sat cat the", "the cat sat", rouge_f(1, 3, 3)),  # order counts
        ("a a a b", "a b", rouge_f(2, 2, 2)),  # words count once
        ("x y. a b", "a b. x y", rouge_f(4, 4, 4)),  # every pair of sentences
        ("a b.\n", "a b", rouge_f(2, 3, 2)),  # the line feed after the full stop is a sentence with an empty word
        ("", "a", 0.0),
        ("...", "a", 0.0),
        ("a", ".", 0.0),
        ("c", "a", 0.0),
        ("b a", "a b", rouge_f(1, 2, 2)),
    ],
)
def test_rouge_l_of_summaries(prediction, reference, expected):
    assert metrics.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_of_two_common_subsequences_the_one_that_ends_first_in_the_prediction_is_taken():
    assert metrics._common_words(["a", "b"], ["b", "a"]) == {"b"}
    assert metrics._common_words(["a", "b", "c", "d"], ["a", "c", "b", "d"]) == {"a", "c", "d"}


def test_a_pair_of_very_long_sentences_is_scored():
    words = " ".join(f"w{i}" for i in range(3000))
    assert metrics.rouge_l(words, words) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "classes", "expected"),
    [
        ("Location", "Location", ("Location", "Person"), 1.0),
        ("Location or Person", "Location", ("Location", "Person"), 0.5),
        ("Person", "Location", ("Location", "Person"), 0.0),
        ("", "Location", ("Location", "Person"), 0.0),
        ("Other location", "Other location", ("location", "Other location"), 1.0),  # a part of the right name
        # a and b are parts of abc; b moves into a's place and is not looked at
        ("abc", "abc", ("a", "b", "abc"), 0.5),
        ("abc", "abc", ("a", "abc", "b"), 1.0),  # abc moves up and is skipped, then b goes
        ("location", "Location", ("Location",), 0.0),  # case counts
    ],
)
def test_classification(prediction, reference, classes, expected):
    assert metrics.classification(prediction, reference, classes) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"), [("8", 1.0), ("8 of 10, so 8", 2 / 3), ("eight", 0.0), ("18", 0.0), ("", 0.0)]
)
def test_count(prediction, expected):
    assert metrics.count(prediction, "8") == expected


def test_retrieval():
    assert metrics.retrieval("Paragraph 15", "Paragraph 15") == 1.0
    assert metrics.retrieval("15 or 16", "Paragraph 15") == 0.5
    assert metrics.retrieval("Paragraph 5", "Paragraph 15") == 0.0
    assert METRICS["retrieval_zh"]("段落3", "段落3", ()) == 1.0
    assert METRICS["retrieval_zh"]("3 4 3", "段落3", ()) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "reference", "difflib", "levenshtein"),
    [
        ("x = 1\ny = 2", "x = 1", 1.0, 1.0),
        ("\n\nx = 1", "x = 1", 1.0, 1.0),  # leading line feeds
        ("# note\n// note\n```\nx = 1", "x = 1", 1.0, 1.0),  # comments and fences
        ("# note\n\nx = 1", "x = 1", 0.0, 0.0),  # an empty line is a line
        ("", "x = 1", 0.0, 0.0),
        ("# only", "", 1.0, 1.0),
        ("abcd", "abef", 0.5, 0.5),
        ("abx", "abyz", 0.57, 0.57),  # 2 * 2 / 7 = 0.5714
        # difflib takes the longest block first (xx) and loses what crosses it; the longest subsequence is abc
        ("xxabc", "a1b1cxx", 0.33, 0.5),
    ],
)
def test_code_similarity(prediction, reference, difflib, levenshtein):
    assert metrics.code_similarity(prediction, reference) == pytest.approx(difflib)
    assert metrics.code_similarity(prediction, reference, ratio="levenshtein") == pytest.approx(levenshtein)


def split_in_twos(text):
    return [text[i : i + 2] for i in range(0, len(text), 2)]


def test_chinese_metrics_are_those_of_words(monkeypatch):
    monkeypatch.setattr(metrics, "chinese_words", split_in_twos)
    # 北京 大学 against 北京 天气: one word of two
    assert metrics.qa_f1_zh("北京大学", "北京天气") == 0.5
    assert metrics.qa_f1_zh("北京，。大学", "北京大学") == 1.0  # punctuation alone is no word
    assert metrics.qa_f1_zh("《a北京", "a北京") == 0.0  # 《 is kept, so the words are 《a 北京 and a北 京
    assert metrics.rouge_l_zh("北京大学", "北京天气") == pytest.approx(rouge_f(1, 2, 2))


def test_chinese_words_need_jieba(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(MissingExtraError, match=r"longext\[zh\]"):
        metrics.qa_f1_zh("北京", "北京")


def test_chinese_words_are_jiebas():
    pytest.importorskip("jieba")
    assert metrics.chinese_words("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]
