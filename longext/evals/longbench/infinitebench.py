"""InfiniteBench (Zhang et al., arXiv 2402.13718): its 12 tasks, their prompts and how an answer to each is scored.

The scores are those of the authors' `compute_scores.py`, to the digit. Prompts are read from the installed lm-eval,
which has the authors' GPT-4 prompts for all tasks but math_calc.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longext.errors import LongextError, MissingExtraError
from longext.evals.longbench.metrics import f1, normalized_chinese_characters, normalized_words
from longext.evals.longbench.tasks import TaskLoader
from longext.registry import Registry

Score = Callable[[str, Any], float]  # (answer, label) -> 0 to 1
_MARKS = "\n:\"'.,?!{}"
_OPTIONS = "ABCD"


@dataclass(frozen=True)
class InfiniteTask:
    """One task.

    Attributes:
        title: as the authors' tables have it.
        max_new_tokens: as the authors'.
        score: (answer, label) -> 0 to 1.
        file: name of lm-eval's definition, which has the prompt; "" if it has none.
        stops: an answer ends at its first line.
    """

    title: str
    max_new_tokens: int
    score: Score
    file: str


def _spaced(text: str, marks: Sequence[str] = _MARKS) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def _first(label: Any) -> Any:
    return label[0] if isinstance(label, list) else label


def first_digits(answer: str, label: Any) -> float:
    """Return 1 if the first run of digits is the label, as text."""
    found = re.search("[0-9]+", answer)
    return float(_first(label) == (found[0] if found else ""))


def has_word(answer: str, label: Any) -> float:
    """Return 1 if the label is a word of the answer, punctuation taken for space."""
    return float(_first(label) in _spaced(answer).split())


def names_character(answer: str, label: Any) -> float:
    """Return 1 if the first label is a word of the answer in capitals (a label of two words never is)."""
    return float(_first(label) in [word.upper() for word in _spaced(answer).split()])


def last_number(answer: str, label: Any) -> float:
    """Return 1 if the last word is the whole number of the label."""
    words = _spaced(answer.strip(), "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) == _first(label))
    except ValueError:
        return 0.0


def first_number(answer: str, label: Any) -> float:
    """Return 1 if the first number is that of the label; a fraction where a whole number is asked is cut before it."""
    wanted, found = _first(label), re.search(r"\d+\.\d+|\d+", answer)
    if found is None:
        return 0.0
    if isinstance(wanted, int):
        # the authors' script ends with an error at a fraction; here it is another number
        return float(found[0].isdigit() and int(found[0]) == wanted)
    return float(float(found[0]) == wanted)


def leading_values(answer: str, label: Any) -> float:
    """Return the share of a list's values up to the first wrong one; signs are not read, as in the authors' script."""
    wanted = label[0] if isinstance(label[0], list) else label
    right = 0
    for value, digits in zip(wanted, re.findall("[0-9]+", answer), strict=False):
        if digits.lstrip("0") != str(value).lstrip("0"):  # a model may write more digits than a number can have
            break
        right += 1
    return right / len(wanted)


def _behind(text: str, prefixes: Sequence[str], wanted: Sequence[str]) -> float | None:
    """Return whether one of `wanted` follows the first of `prefixes` in a text (and one more character); else None."""
    for prefix in prefixes:
        place = text.find(prefix)
        if place >= 0:
            rest = text[place + len(prefix) + 1 :]
            return float(len(text) > place + len(prefix) and any(rest.startswith(each) for each in wanted))
    return None


def finds_bug(answer: str, label: Any) -> float:
    """Return 1 for the letter in front, or letter or name of the function behind "answer is:" and the like."""
    name, letter = label
    answer = answer.strip()
    if answer[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub(" +", " ", _spaced(answer, ["\n", "`", "'", '"', "-", "*", "Option", "option"]))
    return _behind(text, ("answer is:", "is:", "answer:", "correct option is:"), (letter, name)) or 0.0


def chooses(answer: str, label: Any) -> float:
    """Return 1 for the right letter in front, behind "answer is" and the like, or as the first that is a word."""
    answer = answer.strip()
    if not answer:
        return 0.0
    if answer[0] in _OPTIONS:
        return float(answer[0] in label)
    if answer in label:
        return 1.0
    text = re.sub(" +", " ", _spaced(answer, "\n\"'.,?!{}"))
    found = _behind(text, ("answer is:", "answer:", "answer is", "option is"), label)
    if found is not None:
        return found
    letter = next((word for word in text.split() if word in _OPTIONS), None)
    return float(letter is not None and letter in label)


def _listed(label: Any) -> list[str]:
    return label if isinstance(label, list) else list(label)


def answers_f1(answer: str, label: Any) -> float:
    """Return the best F1 of SQuAD's words over the labels."""
    return max((f1(normalized_words(answer), normalized_words(text)) for text in _listed(label)), default=0.0)


def answers_f1_chinese(answer: str, label: Any) -> float:
    """Return the best F1 of characters over the labels."""
    own = normalized_chinese_characters(answer)
    return max((f1(own, normalized_chinese_characters(text)) for text in _listed(label)), default=0.0)


def rouge_lsum(answer: str, label: Any) -> float:
    """Return rougeLsum of the package rouge_score, without stemming, as Hugging Face's evaluate computes it.

    Raises:
        MissingExtraError: rouge_score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingExtraError("longbook_sum_eng is scored by rouge_score: pip install rouge_score") from error
    scorer = RougeScorer(["rougeLsum"])
    labels = label if isinstance(label, list) else [label]
    return max(float(scorer.score(text, answer)["rougeLsum"].fmeasure) for text in labels)


INFINITE_TASKS: Registry[InfiniteTask] = Registry("task")
for _name, _task in {
    "passkey": InfiniteTask("Retrieve.PassKey", 6, first_digits, "passkey"),
    "number_string": InfiniteTask("Retrieve.Number", 12, first_digits, "number_string"),
    "kv_retrieval": InfiniteTask("Retrieve.KV", 50, has_word, "kv_retrieval"),
    "longbook_sum_eng": InfiniteTask("En.Sum", 1200, rouge_lsum, "longbook_sum_en"),
    "longbook_qa_eng": InfiniteTask("En.QA", 40, answers_f1, "longbook_qa_en"),
    "longbook_choice_eng": InfiniteTask("En.MC", 40, chooses, "longbook_choice_en"),
    "longdialogue_qa_eng": InfiniteTask("En.Dia", 40, names_character, "longdialogue_qa_en"),
    "longbook_qa_chn": InfiniteTask("Zh.QA", 40, answers_f1_chinese, "longbook_qa_chn"),
    "code_debug": InfiniteTask("Code.Debug", 5, finds_bug, "code_debug"),
    "code_run": InfiniteTask("Code.Run", 5, last_number, "code_run"),
    "math_calc": InfiniteTask("Math.Calc", 30000, leading_values, ""),
    "math_find": InfiniteTask("Math.Find", 3, first_number, "math_find"),
}.items():
    INFINITE_TASKS.register(_name, _task)


def label_of(task: str, row: Mapping[str, Any]) -> Any:
    """Return what an answer to a row is held to: [answer, its letter] where there are options.

    Raises:
        ValueError: the answer is none of the options.
    """
    answer = row["answer"]
    if task not in ("code_debug", "longbook_choice_eng"):
        return answer
    listed = answer if isinstance(answer, list) else [answer]
    return listed if len(listed) == 2 else [listed[0], _OPTIONS[row["options"].index(listed[0])]]


def prompt_of(task: str, row: Mapping[str, Any]) -> str:
    """Return the prompt of a row.

    Raises:
        LongextError: lm-eval, which has the texts, is not installed or has none for the task.
    """
    found = importlib.util.find_spec("lm_eval")
    folder = Path(str(found.origin)).parent / "tasks" / "infinitebench" if found else Path()
    path = folder / f"infinitebench_{INFINITE_TASKS[task].file}.yaml"
    if found is None or not path.is_file():
        raise LongextError(f"InfiniteBench's prompts are read from lm-eval, which has none for {task}.")
    definition = yaml.load(path.read_text(encoding="utf-8"), TaskLoader)
    text = str(definition["doc_to_text"])
    if "{{" not in text:
        from lm_eval.tasks.infinitebench import utils

        return str(getattr(utils, text.rpartition(".")[2])(row))
    filled = re.sub(r"\{\{(context|input)\}\}", lambda match: str(row[match[1]]), text)
    return f"{definition.get('description', '')}{filled}"
