"""RULER's 13 tasks as NVIDIA configures them (arXiv 2404.06654; NVIDIA/RULER, `synthetic.yaml`, `constants.py`).

The wordings are RULER's own (Apache-2.0): scores under other words would be scores of another test.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from longext.registry import Registry

REACHED = 0.856  # Llama-2-7B-chat at 4K over the 13 tasks: up to where a model reaches it is its effective length

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """One task.

    Attributes:
        kind: how its samples are made: niah, vt, cwe, fwe or qa.
        max_new_tokens: budget of the answer; it counts in the length of a sample.
        prompt, opening: what a user asks, and the beginning of the answer that every model is given.
        is_any: one of the references in the answer is enough; if not, the score is the share that stands in it.
        haystack: niah: noise, essay or needles (more sentences like the one that is asked for).
        keys, values: niah: what they are: words, numbers or uuids.
        num_keys, num_values, num_queries: niah: needles with different keys, values of each, keys asked for.
        questions: qa: one (SQuAD) or two (HotpotQA) paragraphs are needed for an answer.
    """

    summary: str
    kind: str
    max_new_tokens: int
    prompt: str = ""
    opening: str = ""
    is_any: bool = False
    haystack: str = ""
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    questions: str = ""


RULER_TASKS: Registry[RulerTask] = Registry("task")


def _niah(name: str, summary: str, **more: object) -> None:
    RULER_TASKS.register(name, RulerTask(summary=summary, kind="niah", max_new_tokens=128, **more))  # type: ignore[arg-type]


_niah("niah_single_1", "a number in noise", haystack="noise")
_niah("niah_single_2", "a number in essays", haystack="essay")
_niah("niah_single_3", "a UUID in essays", haystack="essay", values="uuids")
_niah("niah_multikey_1", "four numbers in essays, one asked for", haystack="essay", num_keys=4)
_niah("niah_multikey_2", "a number among sentences of its kind", haystack="needles")
_niah("niah_multikey_3", "a UUID among sentences of its kind", haystack="needles", keys="uuids", values="uuids")
_niah("niah_multivalue", "four numbers of one key", haystack="essay", num_values=4)
_niah("niah_multiquery", "four keys, all asked for", haystack="essay", num_keys=4, num_queries=4)
RULER_TASKS.register(
    "vt",
    RulerTask(
        summary="variables that have one value through a chain of assignments",
        kind="vt",
        max_new_tokens=30,
        prompt="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above.",
        opening=" Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
        "assigned the value {query}, they are: ",
    ),
)
RULER_TASKS.register(
    "cwe",
    RulerTask(
        summary="the ten most common words of a list",
        kind="cwe",
        max_new_tokens=120,
        prompt="Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
        "ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
        opening=" Answer: The top 10 words that appear most often in the list are:",
    ),
)
RULER_TASKS.register(
    "fwe",
    RulerTask(
        summary="the three most frequent coded words of a text",
        kind="fwe",
        max_new_tokens=50,
        prompt="Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots "
        "'....'. What are the three most frequently appeared words in the above coded text?",
        opening=" Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
)
_ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
for _name, _summary, _questions in (
    ("qa_1", "a question on one of many paragraphs", "one"),
    ("qa_2", "a question on two of many paragraphs", "two"),
):
    RULER_TASKS.register(
        _name,
        RulerTask(
            summary=_summary,
            kind="qa",
            max_new_tokens=32,
            prompt=f"{_ONLY}\n\nThe following are given documents.\n\n{{context}}\n\n{_ONLY}\n\nQuestion: {{query}}",
            opening=" Answer:",
            is_any=True,
            questions=_questions,
        ),
    )


def match_all(expected: Sequence[str], answer: str) -> float:
    """Return the share of `expected` that stands in `answer`, case ignored (string_match_all of one prompt)."""
    text = _UNPRINTABLE.sub("\n", answer.strip()).lower()
    return sum(each.lower() in text for each in expected) / len(expected)


def ruler_score(task: str, expected: Sequence[str], answer: str) -> float:
    """Return RULER's score: `match_all`; of a qa task 1 if any of `expected` is there (string_match_part)."""
    share = match_all(expected, answer)
    return float(share > 0) if RULER_TASKS[task].is_any else share
