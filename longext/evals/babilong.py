"""BABILong: greedy answers to questions on facts in long text, scored by the authors' rule."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from longext.errors import ConfigError
from longext.evals.babilong_data import BABILONG_TASKS, PROMPTS, BABILongRow, prompt_text
from longext.evals.config import BABILongConfig
from longext.evals.retrieval import (
    Outcome,
    Progress,
    answers_to,
    cell_rows,
    cells_of,
    pooled_cells,
    text_hash,
)
from longext.manifest import result_record
from longext.models.answers import Prediction
from longext.models.chat import asked_facts, chat_tokens, user_text, uses_template
from longext.models.methods import check_method
from longext.models.protocol import LanguageModel
from longext.registry import did_you_mean

_ENDS = (".", "<context>", "<example>")  # what follows is not the answer


def check_babilong_config(config: BABILongConfig) -> None:
    """Raise ConfigError for an unknown task or prompt, or a value out of range."""
    for task in config.tasks:
        BABILONG_TASKS[task]
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ConfigError(f"--tasks must name different tasks, got {','.join(config.tasks) or 'none'}.")
    if config.prompt not in PROMPTS:
        raise ConfigError(f"Unknown prompt '{config.prompt}'. {did_you_mean(config.prompt, PROMPTS)}")
    if config.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be >= 1, got {config.max_new_tokens}.")
    check_method(config.method, config.factor)


def is_right(task: str, answer: str, question: str, target: str) -> bool:
    """Return the authors' verdict: the target is the one possible answer of the task that the first sentence names.

    Case is ignored; possible answers that the question names itself do not count.
    """
    text = answer.lower()
    for end in _ENDS:
        text = text.split(end)[0]
    labels = {label.lower() for label in BABILONG_TASKS[task].labels}
    named = {label for label in labels if label in text and label not in question.lower()}
    return named == {target.lower()}


def evaluate_babilong(
    model: LanguageModel,
    rows: Sequence[BABILongRow],
    config: BABILongConfig,
    path: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[list[Outcome], dict[str, Prediction], float]:
    """Return (outcome of each row, answers by id, wall seconds).

    Args:
        path: where answers are kept, for a run that is cut off.
        on_progress: called with the number of rows just answered.
    """
    started = time.perf_counter()
    is_chat = uses_template(model, config.chat_template)
    texts = {row.id: user_text(model, prompt_text(row, config.prompt)) for row in rows}
    prompts = {
        name: chat_tokens(model, text) if is_chat else model.encode(f"{text}\nAnswer:") for name, text in texts.items()
    }
    answers = answers_to(
        model,
        prompts,
        config.max_new_tokens,
        path=path,
        on_progress=on_progress,
        batch_tokens=config.batch_tokens,
        is_chat=is_chat,
    )
    outcomes = [
        Outcome(
            row.task,
            row.length,
            None,
            float(is_right(row.task, answers[row.id].text, row.question, row.target)),
            answers[row.id].num_prompt_tokens,
        )
        for row in rows
    ]
    return outcomes, answers, time.perf_counter() - started


def babilong_record(
    model: LanguageModel,
    config: BABILongConfig,
    rows: Sequence[BABILongRow],
    outcomes: Sequence[Outcome],
    seconds: float,
    answers: Collection[Prediction] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the JSON record of a BABILong run."""
    is_chat = uses_template(model, config.chat_template)
    return result_record(
        "babilong",
        model.describe(),
        {
            "id": "babilong",
            "definition": f"greedy answers of up to {config.max_new_tokens} tokens; prompt: {config.prompt}, built as "
            "the authors' in longext's own words (figures compare with others made here); without a chat template "
            "'Answer:' follows the question",
            "reference": "BABILong, arXiv 2406.10149",
            "scoring": "the target is the only possible answer of the task that the first sentence names, case "
            "ignored, those in the question left out (as the authors)",
            "chat_template": is_chat,
            **asked_facts(model, is_chat, (own.prompt_sha256 for own in answers)),
            "tasks": {name: BABILONG_TASKS[name].summary for name in config.tasks},
        },
        {
            "data": config.data,
            "num_rows": len(rows),
            "sha256": text_hash(f"{row.text}{row.question}{row.target}" for row in rows),
        },
        seconds=seconds,
        results=cell_rows(cells_of(outcomes)),
        by_length=cell_rows(pooled_cells(outcomes)),
        notes=list(notes),
    )
