"""The metrics of LongBench, each 0 to 1 for one prediction and one reference, as the authors' scores are defined.

Bai et al., LongBench, arXiv 2308.14508. If a library defines a number, it does here too: ROUGE-L as the `rouge`
package computes it, `fuzzywuzzy`'s ratio for code, `jieba` for words of Chinese text.
"""

from __future__ import annotations

import difflib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from longext.evals.text_metrics import lcs_rows, longest_common_subsequence
from longext.extras import has, require

Metric = Callable[[str, str, Sequence[str]], float]  # (prediction, reference, all classes of the task)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# 《 and 〈 〉 are not among them in the authors' definition either
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_COMMENT_MARKS = ("`", "#", "//")


# --- answers ----------------------------------------------------------------------------------------------------------


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of two bags of words: 2 |common| / (|prediction| + |reference|); 0 if nothing is common."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def normalized_words(text: str) -> list[str]:
    """Return SQuAD's words of a text: lower case, without ASCII punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def qa_f1(prediction: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return the F1 of SQuAD's words (Rajpurkar et al., 2016)."""
    return f1(normalized_words(prediction), normalized_words(reference))


def qa_f1_zh(prediction: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return the F1 of jieba's words, each without punctuation and white space, in lower case; empty ones left out."""
    return f1(_normalized_chinese(prediction), _normalized_chinese(reference))


def _normalized_chinese(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_ALL_PUNCTUATION).split()) for word in chinese_words(text))
    return [word for word in words if word]


def normalized_chinese_characters(text: str) -> list[str]:
    """Return the characters of a text in lower case, without punctuation and white space."""
    return list("".join(text.lower().translate(_ALL_PUNCTUATION).split()))


def chinese_words(text: str) -> list[str]:
    """Return the words that jieba finds in a text (its default mode).

    Raises:
        MissingExtraError: jieba is not installed.
    """
    require("Chinese text, which is scored by word,", ["zh"])
    import jieba  # type: ignore[import-not-found,import-untyped,unused-ignore]

    jieba.setLogLevel(logging.WARNING)
    words: list[str] = jieba.lcut(text)
    return words


def has_jieba() -> bool:
    """Return True if jieba is installed."""
    return has("jieba")


# --- summaries --------------------------------------------------------------------------------------------------------


def rouge_l(prediction: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return ROUGE-L of summaries as version 1.0.1 of the `rouge` package defines it (Lin, 2004, section 3.2).

    Sentences end at full stops. The words of a longest common subsequence are taken for every pair of a reference
    and a predicted sentence; the score is the F1 of how many different words these are, against the numbers of
    different words of both texts. 0 if either text has no sentence.

    The package fails, and LongBench then scores 0, if a pair of sentences has about 1,000 words in all (its
    recursion ends there); here such a pair is scored like any other.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    common: set[str] = set()
    for reference_words in expected:
        for predicted_words in predicted:
            common |= _common_words(reference_words, predicted_words)
    recall = len(common) / len({word for words in expected for word in words})
    precision = len(common) / len({word for words in predicted for word in words})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def rouge_l_zh(prediction: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return `rouge_l` of jieba's words, joined by spaces."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(reference)))


def _sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence; a sentence of white space alone holds one empty word, as in the package."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_words(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """Return the words of one longest common subsequence: if two are as long, that of the shorter `second`."""
    rows = lcs_rows(first, second)

    def length(i: int, j: int) -> int:
        return j - (rows[i] & ((1 << j) - 1)).bit_count()

    i, j, found = len(first), len(second), set()
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.add(first[i - 1])
            i, j = i - 1, j - 1
        elif length(i - 1, j) > length(i, j - 1):
            i -= 1
        else:
            j -= 1
    return found


# --- classes, numbers, code -------------------------------------------------------------------------------------------


def classification(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 / (classes that the prediction names), 0 if the right one is not among them.

    A named class that is a part of the right one's name does not count against it. The authors' code removes those
    while it walks over the list, and so skips the neighbour of each: kept, because published scores have it.
    """
    named = [name for name in all_classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in reference and named[place] != reference:
            named.remove(named[place])  # what follows moves up and is not looked at
        place += 1
    return 1.0 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the prediction that are the reference."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, _: Sequence[str] = (), *, word: str = "Paragraph ") -> float:
    """Return the share of the numbers in the prediction that are the one behind `word` in the reference."""
    right = re.search(rf"{word}(\d+)", reference)
    return count(prediction, right[1]) if right else 0.0


def code_similarity(prediction: str, reference: str, _: Sequence[str] = (), *, ratio: str = "difflib") -> float:
    """Return how alike the first line of code is to the reference, in whole hundredths.

    The first line, after leading line feeds, without a comment or fence mark; empty if there is none.

    Args:
        ratio: "difflib", what `fuzzywuzzy` uses by itself, or "levenshtein", what it uses if python-Levenshtein is
            installed: twice the longest common subsequence of characters over both lengths.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _COMMENT_MARKS)), "")
    return round(100 * CODE_RATIOS[ratio](line, reference)) / 100


def _difflib_ratio(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _levenshtein_ratio(first: str, second: str) -> float:
    length = len(first) + len(second)
    return 2 * longest_common_subsequence(first, second) / length if length else 1.0


CODE_RATIOS: dict[str, Callable[[str, str], float]] = {"difflib": _difflib_ratio, "levenshtein": _levenshtein_ratio}
METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": partial(retrieval, word="段落"),
    "code_similarity": code_similarity,
}
NEED_JIEBA = ("qa_f1_zh", "rouge_l_zh")


def metric_called(name: str, ratio: str) -> Metric:
    """Return a metric, the code metric with its `ratio`."""
    chosen: Any = METRICS[name]
    return partial(chosen, ratio=ratio) if name == "code_similarity" else chosen
