"""LongEval's cases: read from LMSYS's files, or made here in the same form (lmsys.org/blog/2023-06-29-longchat).

Lines: a record of lines "line KEY: REGISTER_CONTENT is <NUMBER>", one number asked for. Topics: a conversation about
several topics, the first asked for. Files are JSON lines named <n>_lines.jsonl and <n>_topics.jsonl.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longext.data.json_lines import text_fields
from longext.errors import ConfigError, DataError
from longext.evals.ruler.words import NUM_NAMES, draw_different, draw_name
from longext.untrusted import json_lines

_KIND = "case of LongEval"
_WHERE = "LMSYS's are in longeval/evaluation of github.com/DachengLi1/LongChat; lines can be generated (no --data)."
LINES, TOPICS = "lines", "topics"
PUBLISHED_SIZES = {LINES: (200, 300, 400, 500, 600, 680), TOPICS: (5, 10, 15, 20, 25)}
_MAX_NUMBER = 50_000  # the published cases hold numbers of one to five digits
_TASK_LINE = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
_QUESTION = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number. "
_NAMED = re.compile(r"^(\d+)_(lines|topics)\.jsonl$")


@dataclass(frozen=True)
class LongEvalCase:
    """One question.

    Attributes:
        task: lines or topics.
        size: how many of them.
        prompt: the text a user sends.
        expected: the number, or the first topic.
        key: the line asked for; "" for topics.
    """

    task: str
    size: int
    prompt: str
    expected: str
    key: str


def read_cases(folder: str, tasks: Sequence[str], sizes: Sequence[int], num_cases: int) -> list[LongEvalCase]:
    """Return the first `num_cases` cases of each file of `tasks` and `sizes` (all there are, where empty) in a folder.

    Files may lie in sub-folders, as LMSYS has them (lines/testcases, topics/testcases).

    Raises:
        ConfigError: no folder, or no such size in it.
        DataError: a line that is no case, with file and number.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"--data must be a folder with <n>_lines.jsonl or <n>_topics.jsonl, got '{folder}'. {_WHERE}")
    found: dict[tuple[str, int], list[Path]] = {}
    for path in sorted(root.rglob("*.jsonl")):
        named = _NAMED.match(path.name)
        if named and named.group(2) in tasks and path.is_file():
            found.setdefault((named.group(2), int(named.group(1))), []).append(path)
    there = ", ".join(f"{size}_{task}.jsonl" for task, size in sorted(found)) or "none"
    if not found or not set(sizes) <= {size for _, size in found}:
        wanted = f"of {', '.join(map(str, sizes))} " if sizes else ""
        raise ConfigError(f"No cases {wanted}for --tasks {','.join(tasks)} in {root}; found there: {there}. {_WHERE}")
    chosen = sorted(key for key in found if not sizes or key[1] in sizes)
    for key in chosen:
        if len(found[key]) > 1:
            raise ConfigError(f"Two files of one name: {found[key][0]} and {found[key][1]}. Give --data one's folder.")
    return [case for task, size in chosen for case in _read_file(found[task, size][0], task, size)[:num_cases]]


def _read_file(path: Path, task: str, size: int) -> list[LongEvalCase]:
    cases = [_case(value, where, task, size) for where, value in json_lines(path)]
    if not cases:
        raise DataError(f"{path} holds no case.")
    return cases


def _case(value: Any, where: str, task: str, size: int) -> LongEvalCase:
    (prompt,) = text_fields(where, value, ("prompt",), _KIND)
    if task == TOPICS:
        return LongEvalCase(task, size, prompt, _first_text(where, value, "topics"), "")
    number = value.get("expected_number")
    if not str(number).isdecimal():
        raise DataError(f"{where} is no {_KIND}: no whole number under 'expected_number'.")
    return LongEvalCase(task, size, prompt, str(int(str(number))), _first_text(where, value, "random_idx"))


def _first_text(where: str, value: dict[str, Any], name: str) -> str:
    texts = value.get(name)
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise DataError(f"{where} is no {_KIND}: no list that begins with a text under '{name}'.")
    return texts[0]


def generate_lines(size: int, num_cases: int, seed: int) -> list[LongEvalCase]:
    """Return `num_cases` cases of `size` lines with different keys; the same seeds give the same cases.

    Raises:
        ConfigError: more lines than there are different keys.
    """
    return [_generate(size, np.random.default_rng([seed, size, index])) for index in range(num_cases)]


def _generate(size: int, rng: np.random.Generator) -> LongEvalCase:
    taken: set[str] = set()
    keys = [draw_different(lambda: draw_name(rng), taken, NUM_NAMES) for _ in range(size)]
    numbers = rng.integers(1, _MAX_NUMBER + 1, size).tolist()
    asked = int(rng.integers(size))
    record = "".join(f"line {key}: REGISTER_CONTENT is <{number}>\n" for key, number in zip(keys, numbers, strict=True))
    prompt = _TASK_LINE + record + _QUESTION.format(key=keys[asked])
    return LongEvalCase(LINES, size, prompt, str(numbers[asked]), keys[asked])
