"""LongEval: retrieval of a line or of the first topic, scored as LMSYS scores it where a rule exists.

Lines: the last run of digits of the answer is the number. Topics are judged by GPT-3.5 or by eye there; here the topic
must stand in the answer, case ignored (as FlagEmbedding's re-use of the cases has it). The two are not comparable.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.errors import ConfigError, DataError
from longext.evals.config import LongEvalConfig
from longext.evals.longeval_data import LINES, TOPICS, LongEvalCase, generate_lines, read_cases
from longext.evals.retrieval import Outcome, Progress, answers_to, cell_rows, cells_of, text_hash
from longext.manifest import result_record
from longext.models.answers import Prediction
from longext.models.chat import asked_facts, chat_tokens, user_text, uses_template
from longext.models.methods import check_method
from longext.models.protocol import LanguageModel
from longext.registry import did_you_mean
from longext.untrusted import numbered_lines

NEW_TOKENS = {LINES: 100, TOPICS: 50}
_COMPLETION_TOKENS = 15
_GENERATED_SIZES = (20, 50, 100)
_PUBLISHED_LINE = re.compile(r"^Label: (.*?), Predict: (.*?)(?:, Parsed: (-?\d+))?, prompt length: (-?\d+)$")


def check_longeval_config(config: LongEvalConfig) -> None:
    """Raise ConfigError for an unknown task or a value out of range."""
    for task in config.tasks:
        if task not in NEW_TOKENS:
            raise ConfigError(f"Unknown task '{task}'. {did_you_mean(task, NEW_TOKENS)}")
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ConfigError(f"--tasks must name different tasks, got {','.join(config.tasks) or 'none'}.")
    if any(size < 1 for size in config.sizes):
        raise ConfigError(f"--sizes must be whole numbers >= 1, got {list(config.sizes)}.")
    if config.complete and (config.chat_template or config.template_arg):
        given = "--chat-template" if config.chat_template else "--template-arg"
        raise ConfigError(f"--complete is for models that only continue, {given} for those that answer: leave one out.")
    check_method(config.method, config.factor)


def load_cases(config: LongEvalConfig) -> list[LongEvalCase]:
    """Return the cases of `config.data`, or generated lines where there is none (topics need LMSYS's conversations).

    Raises:
        ConfigError, DataError: as `read_cases`; or topics without data.
    """
    if config.data is not None:
        return read_cases(config.data, config.tasks, config.sizes, config.num_cases)
    if LINES not in config.tasks:
        raise ConfigError("--tasks topics needs --data: LMSYS's conversations cannot be generated. lines can.")
    sizes = sorted(set(config.sizes or _GENERATED_SIZES))
    return [case for size in sizes for case in generate_lines(size, config.num_cases, config.seed)]


# --- scores -----------------------------------------------------------------------------------------------------------


def is_right(task: str, answer: str, expected: str) -> bool:
    """Return LongEval's verdict on one answer."""
    if task == TOPICS:
        return " ".join(expected.lower().split()) in " ".join(answer.lower().split())
    digits = re.findall(r"\d+", answer)
    return bool(digits) and int(digits[-1]) == int(expected)


@dataclass(frozen=True)
class PublishedAnswers:
    """Answers in a file as LMSYS's script writes them.

    Attributes:
        outcomes: how each was scored here.
        task, size: lines or topics, and how many (0 where the name of the file does not say).
        stated: the accuracy on the last line of the file, None where there is none.
    """

    outcomes: list[Outcome]
    task: str
    size: int
    stated: float | None


def score_published(path: Path) -> PublishedAnswers:
    """Return the scores of a file of lines "Label: ..., Predict: ..., Parsed: ..., prompt length: ...".

    Lines of topics have no "Parsed".

    Raises:
        ConfigError: no such file.
        DataError: a line of another form, with its number.
    """
    if not path.is_file():
        raise ConfigError(f"--predictions must be a file of LongEval answers, got '{path}'.")
    named = re.match(r"(\d+)", path.name)
    size, stated, outcomes, task = int(named.group(1)) if named else 0, None, list[Outcome](), LINES
    for where, line in numbered_lines(path):
        if line.startswith("Accuracy: "):
            stated = _accuracy(line, where)
            continue
        found = _PUBLISHED_LINE.match(line.rstrip())
        if found is None or (found.group(3) is not None and not found.group(1).isdecimal()):
            raise DataError(f"{where} is no answer: 'Label: ..., Predict: ..., prompt length: ...' is expected.")
        label, answer, parsed, length = found.groups()
        task = TOPICS if parsed is None else LINES
        outcomes.append(Outcome(task, size, None, float(is_right(task, answer, label)), int(length)))
    if not outcomes:
        raise DataError(f"{path} holds no answer.")
    return PublishedAnswers(outcomes, task, size, stated)


def _accuracy(line: str, where: str) -> float:
    try:
        return float(line.removeprefix("Accuracy: "))
    except ValueError as error:
        raise DataError(f"{where} gives no accuracy: '{line.strip()}'.") from error


# --- running ----------------------------------------------------------------------------------------------------------


def case_ids(cases: Sequence[LongEvalCase]) -> list[str]:
    """Return a name for each case: task, size, number within them."""
    seen: dict[tuple[str, int], int] = {}
    names = []
    for case in cases:
        number = seen.get((case.task, case.size), 0)
        seen[case.task, case.size] = number + 1
        names.append(f"{case.task}/{case.size}/{number}")
    return names


def prompt_text(case: LongEvalCase, complete: bool) -> str:
    """Return the prompt; with `complete`, the beginning of the answer behind it, for models that only continue."""
    if not complete:
        return case.prompt
    return case.prompt + (
        f"Line <{case.key}>: <REGISTER_CONTENT> is" if case.task == LINES else "\n ASSISTANT: The first topic is"
    )


def uses_chat(model: LanguageModel, config: LongEvalConfig) -> bool:
    """Return True where prompts go through the tokenizer's chat template; a completion is asked for without."""
    return not config.complete and uses_template(model, config.chat_template)


def evaluate_longeval(
    model: LanguageModel,
    cases: Sequence[LongEvalCase],
    config: LongEvalConfig,
    path: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[list[Outcome], dict[str, Prediction], float]:
    """Return (outcome of each case, answers by id, wall seconds).

    Args:
        path: where answers are kept, for a run that is cut off.
        on_progress: called with the number of cases just answered.
    """
    started, is_chat = time.perf_counter(), uses_chat(model, config)
    prompts: dict[str, list[int]] = {}
    budgets: dict[str, int] = {}
    for name, case in zip(case_ids(cases), cases, strict=True):
        text = user_text(model, prompt_text(case, config.complete))
        prompts[name] = chat_tokens(model, text) if is_chat else model.encode(text)
        budgets[name] = _COMPLETION_TOKENS if config.complete else NEW_TOKENS[case.task]
    answers = answers_to(
        model,
        prompts,
        budgets,
        stop=("\n",) if config.complete else (),
        path=path,
        on_progress=on_progress,
        batch_tokens=config.batch_tokens,
        is_chat=is_chat,
    )
    outcomes = [
        Outcome(
            case.task,
            case.size,
            None,
            float(is_right(case.task, answers[name].text, case.expected)),
            answers[name].num_prompt_tokens,
        )
        for name, case in zip(prompts, cases, strict=True)
    ]
    return outcomes, answers, time.perf_counter() - started


def _definition(config: LongEvalConfig) -> str:
    if config.predictions:
        return "answers read from a file, scored here"
    if config.complete:
        return f"greedy answers of one line, up to {_COMPLETION_TOKENS} tokens; their beginning is given"
    return "greedy answers of up to 100 tokens (topics: 50)"


def longeval_record(
    model: LanguageModel | None,
    config: LongEvalConfig,
    outcomes: Sequence[Outcome],
    cases: Sequence[LongEvalCase] = (),
    answers: Collection[Prediction] = (),
    **body: Any,
) -> dict[str, Any]:
    """Return the JSON record of a LongEval run, or (no model) of published answers that were scored."""
    is_chat = model is not None and uses_chat(model, config)
    return result_record(
        "longeval",
        model.describe() if model else {"id": config.model or None, "answers_from": config.predictions},
        {
            "id": "longeval",
            "definition": _definition(config),
            "reference": "LongChat and LongEval, lmsys.org/blog/2023-06-29-longchat",
            "scoring": "lines: the last integer of the answer is the number (as LMSYS); topics: the first topic stands "
            "in the answer, case ignored (LMSYS: judged by GPT-3.5)",
            "chat_template": None if model is None else is_chat,
            "seed": None if config.data or config.predictions else config.seed,
            **(asked_facts(model, is_chat, (own.prompt_sha256 for own in answers)) if model else {}),
        },
        {
            "data": config.predictions or config.data or "generated",
            "num_cases": len(outcomes),
            "sha256": text_hash(case.prompt for case in cases) if cases else None,
        },
        results=cell_rows(cells_of(outcomes)),
        **body,
    )
