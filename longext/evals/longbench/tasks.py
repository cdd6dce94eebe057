"""The 21 tasks of LongBench as its authors evaluate them (Bai et al., arXiv 2308.14508), and their prompts.

The texts of the prompts are read from the task definitions of the installed lm-eval, which carries them with some
white space changed; what is changed is put back here, and a hash says whether the result is the authors' prompt.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longext.errors import LongextError
from longext.extras import require
from longext.registry import Registry

CATEGORIES = {
    "single": "single-document QA",
    "multi": "multi-document QA",
    "summarization": "summarization",
    "few-shot": "few-shot learning",
    "code": "code completion",
    "synthetic": "synthetic",
}
LANGUAGES = {"english": "en", "chinese": "zh"}  # of the averages
BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": None}  # LongBench-E: `length` below this


@dataclass(frozen=True)
class Task:
    """How one task is asked and scored.

    Attributes:
        category: a key of `CATEGORIES`.
        language: en, zh, or code (counted in the averages of both languages).
        metric: a key of `METRICS`.
        max_new_tokens: of an answer.
        num_rows: rows in the full task.
        prompt_hash: first digits of the SHA-256 of the prompt, as a guard against other wordings.
        is_in_e: it has a LongBench-E version.
        has_chat: a chat model is asked through its template. Few-shot and code prompts are given as they are.
        first_line: of the answer only the first line that is not empty is scored.
    """

    category: str
    language: str
    metric: str
    max_new_tokens: int
    num_rows: int
    prompt_hash: str
    is_in_e: bool = False
    has_chat: bool = True
    first_line: bool = False


TASKS: Registry[Task] = Registry("task")


def _few_shot(language: str, metric: str, new: int, digest: str, is_in_e: bool = True) -> Task:
    return Task("few-shot", language, metric, new, 200, digest, is_in_e, has_chat=False, first_line=True)


for _name, _task in {
    "narrativeqa": Task("single", "en", "qa_f1", 128, 200, "f715a4e4720f"),
    "qasper": Task("single", "en", "qa_f1", 128, 200, "20bfb86ba878", True),
    "multifieldqa_en": Task("single", "en", "qa_f1", 64, 150, "db6e0c1a8685", True),
    "multifieldqa_zh": Task("single", "zh", "qa_f1_zh", 64, 200, "52a4c3871964"),
    "hotpotqa": Task("multi", "en", "qa_f1", 32, 200, "c72f49ff6d00", True),
    "2wikimqa": Task("multi", "en", "qa_f1", 32, 200, "c72f49ff6d00", True),
    "musique": Task("multi", "en", "qa_f1", 32, 200, "c72f49ff6d00"),
    "dureader": Task("multi", "zh", "rouge_l_zh", 128, 200, "4d2dc0fb90de"),
    "gov_report": Task("summarization", "en", "rouge_l", 512, 200, "e4e4159a4d92", True),
    "qmsum": Task("summarization", "en", "rouge_l", 512, 200, "0eca1bfd34c6"),
    "multi_news": Task("summarization", "en", "rouge_l", 512, 200, "e729eda84ccf", True),
    "vcsum": Task("summarization", "zh", "rouge_l_zh", 512, 200, "f44becb06365"),
    "trec": _few_shot("en", "classification", 64, "6996b8cabb29"),
    "triviaqa": _few_shot("en", "qa_f1", 32, "f9c2b36a710a"),
    "samsum": _few_shot("en", "rouge_l", 128, "27654a31b056"),
    "lsht": _few_shot("zh", "classification", 64, "2a057c99cfaa", is_in_e=False),
    "passage_count": Task("synthetic", "en", "count", 32, 200, "9cb5ce4fcd51", True),
    "passage_retrieval_en": Task("synthetic", "en", "retrieval", 32, 200, "32396b999ae4", True),
    "passage_retrieval_zh": Task("synthetic", "zh", "retrieval_zh", 32, 200, "ddf89344c63e"),
    "lcc": Task("code", "code", "code_similarity", 64, 500, "86a317fc8d78", True, has_chat=False),
    "repobench-p": Task("code", "code", "code_similarity", 64, 500, "427ee391ce37", True, has_chat=False),
}.items():
    TASKS.register(_name, _task)

_CONTEXT, _QUESTION = "{{context}}", "{{question}}"


def read_prompt(name: str) -> str:
    """Return the prompt of a task with {{context}} and {{question}} in it.

    Raises:
        LongextError: lm-eval is not installed, or its prompt is not the authors' any more.
    """
    require("Reading LongBench's prompts", ["eval"], ["lm_eval"])
    found = importlib.util.find_spec("lm_eval")
    path = Path(str(found.origin)).parent / "tasks" / "longbench" / f"{name}.yaml" if found else None
    if path is None or not path.is_file():
        raise LongextError(f"LongBench's prompts are read from lm-eval, which has none for {name}: pip install lm-eval")
    definition = yaml.load(path.read_text(encoding="utf-8"), TaskLoader)
    prompt = _as_published(name, str(definition["doc_to_text"]))
    if prompt_hash(prompt) != TASKS[name].prompt_hash:
        raise LongextError(
            f"The prompt of {name} in the installed lm-eval is not the one that LongBench's authors use: "
            "install a version that longext names (pip install 'lm-eval>=0.4.13,<0.5')."
        )
    return prompt


def prompt_hash(prompt: str) -> str:
    """Return what tells prompts apart: the first 12 digits of a SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def _as_published(name: str, prompt: str) -> str:
    """Undo lm-eval's changes of white space: an empty line before the question, what stands behind the last word."""
    if name in ("triviaqa", "samsum"):
        return prompt.replace(f"{_CONTEXT}\n{_QUESTION}", f"{_CONTEXT}\n\n{_QUESTION}")
    ends = {"passage_count": " ", "passage_retrieval_en": " ", "lcc": "\n", "repobench-p": "\n"}
    end = ends.get(name, "")
    return prompt if prompt.endswith(end) else prompt + end


def fill_prompt(prompt: str, context: str, question: str) -> str:
    """Return the prompt of one row; what looks like a field inside a text stays as it is."""
    values = {_CONTEXT: context, _QUESTION: question}
    return re.sub(r"\{\{(?:context|question)\}\}", lambda match: values[match[0]], prompt)


class TaskLoader(yaml.SafeLoader):
    """YAML whose tags (`!function ...`) are read as text: nothing of a task definition is run."""


def _tag_as_text(loader: yaml.SafeLoader, suffix: str, node: Any) -> Any:
    return str(node.value)


TaskLoader.add_multi_constructor("!", _tag_as_text)  # type: ignore[no-untyped-call]
