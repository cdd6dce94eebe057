"""A run of LongBench: rows in, answers made or read, scores and the record out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longext.data.json_lines import repeated_note
from longext.errors import DataError
from longext.evals.config import LongBenchConfig
from longext.evals.longbench.metrics import NEED_JIEBA, has_jieba
from longext.evals.longbench.rows import (
    HUB,
    LongBenchRow,
    answers_of,
    longbench_files,
    missing_file,
    read_json_lines,
    read_longbench,
    references_hash,
    rows_hash,
)
from longext.evals.longbench.suite import (
    TaskScore,
    all_averages,
    average_intervals,
    build_requests,
    default_max_length,
    file_stem,
    score_entry,
    score_task,
    wanted_tasks,
)
from longext.evals.longbench.tasks import TASKS, prompt_hash, read_prompt
from longext.manifest import result_record
from longext.models.answers import Prediction, Request, answer_notes, generate_predictions
from longext.models.chat import asked_facts, uses_template
from longext.models.protocol import LanguageModel

GENERATED = "generated"  # answers of an unfinished run
PREDICTIONS = "predictions"  # answers of a finished one, in the authors' schema
_REFERENCE = "Bai et al., LongBench, arXiv 2308.14508; pred.py, eval.py and metrics.py of THUDM/LongBench"


@dataclass
class TaskRun:
    """The rows of one task, and what became of them."""

    name: str
    rows: list[LongBenchRow]
    requests: list[Request] = field(default_factory=list)
    num_truncated: int = 0
    answers: list[str | None] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)


# --- answers that a model makes ---------------------------------------------------------------------------------------


def load_tasks(config: LongBenchConfig) -> tuple[list[TaskRun], list[str]]:
    """Return the tasks to be run with their rows, and notes on those that were left out.

    Raises:
        DataError: a task that was asked for has no file, no task has one, or a file cannot be read.
    """
    names = wanted_tasks(config)
    stems = {name: file_stem(name, config.longbench_e) for name in names}
    files = longbench_files(config.data, list(stems.values()))
    missing = [name for name in names if stems[name] not in files]
    if missing and (config.tasks or len(missing) == len(names)):
        raise missing_file(stems[missing[0]], config.data)
    runs = [TaskRun(name, read_longbench(files[stem], config.limit)) for name, stem in stems.items() if stem in files]
    notes = [f"{config.data} has no file for {', '.join(missing)}: left out."] if missing else []
    asked = ((run.name, (row.question, row.context)) for run in runs for row in run.rows)
    return runs, [*notes, *_jieba_note(config), *repeated_note(asked)]


def _jieba_note(config: LongBenchConfig) -> list[str]:
    needing = [name for name in TASKS if TASKS[name].metric in NEED_JIEBA]
    if config.tasks or config.longbench_e or has_jieba():
        return []
    return [f"{', '.join(needing)} are scored on the words that jieba finds (pip install jieba): left out."]


def prompt_limit(model: LanguageModel, config: LongBenchConfig) -> int | None:
    """Return the length that prompts are cut to: --max-length, else by the context; a memory reads all (None)."""
    if config.max_length is not None or config.memory:
        return config.max_length
    return default_max_length(model.context_length)


def prepare_requests(model: LanguageModel, runs: Sequence[TaskRun], config: LongBenchConfig) -> None:
    """Give every task its prompts."""
    limit, chat = prompt_limit(model, config), uses_chat(model, config)
    for run in runs:
        run.requests, run.num_truncated = build_requests(model, run.name, run.rows, limit, chat)


def uses_chat(model: LanguageModel, config: LongBenchConfig) -> bool:
    """Return True where prompts go through the tokenizer's chat template."""
    return uses_template(model, config.chat_template)


def generate_answers(
    model: LanguageModel,
    runs: Sequence[TaskRun],
    work: Path,
    config: LongBenchConfig,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Answer every prompt, one file of answers per task in `work`; what is there already is not made again."""
    for run in runs:
        path = work / GENERATED / f"{run.name}.jsonl"
        is_chat = uses_chat(model, config) and TASKS[run.name].has_chat
        run.predictions = generate_predictions(
            model, run.requests, path, on_progress, config.batch_tokens, is_chat=is_chat
        )
        run.answers = [prediction.text for prediction in run.predictions]


def write_predictions(runs: Sequence[TaskRun], folder: Path) -> None:
    """Write the answers in the authors' schema (pred, answers, all_classes, length), which their eval.py reads too."""
    folder.mkdir(exist_ok=True)
    for run in runs:
        lines = [
            {
                "pred": prediction.text,
                "answers": row.answers,
                "all_classes": row.all_classes or None,
                "length": row.length,
                "_id": row.id,
                "num_prompt_tokens": prediction.num_prompt_tokens,
                "num_new_tokens": prediction.num_new_tokens,
            }
            for prediction, row in zip(run.predictions, run.rows, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{run.name}.jsonl").write_text(text, encoding="utf-8")


# --- answers that were given ------------------------------------------------------------------------------------------


def read_answers(config: LongBenchConfig) -> tuple[list[TaskRun], list[str]]:
    """Return tasks and answers as <task>.jsonl files of `--predictions` hold them, in the authors' schema.

    With `--data FOLDER` the rows are those of the data: a row that no answer is for is missing and scores 0.

    Raises:
        DataError: no such folder or file, a line that cannot be read, or answers to other rows.
    """
    folder = Path(str(config.predictions)).expanduser()
    if not folder.is_dir():
        raise DataError(f"--predictions {folder} is no folder. Give one with <task>.jsonl files of pred and answers.")
    names = [name for name in wanted_tasks(config) if config.tasks or (folder / f"{name}.jsonl").is_file()]
    if not names:
        raise DataError(f"--predictions {folder} has no file named after a task (<task>.jsonl) that can be scored.")
    runs = [_read_answers(folder / f"{name}.jsonl", name, config) for name in names]
    if config.data != HUB:
        stems = {name: file_stem(name, config.longbench_e) for name in names}
        files = longbench_files(config.data, list(stems.values()))
        for run in runs:
            if stems[run.name] not in files:
                raise missing_file(stems[run.name], config.data)
            _match(run, read_longbench(files[stems[run.name]], config.limit), config)
    empty = [run.name for run in runs if not run.rows]
    if empty:
        raise DataError(f"{folder / empty[0]}.jsonl has no predictions.")
    left_out = [name for name in TASKS if name not in names and (folder / f"{name}.jsonl").is_file()]
    return runs, (_jieba_note(config) if any(TASKS[name].metric in NEED_JIEBA for name in left_out) else [])


def _read_answers(file: Path, name: str, config: LongBenchConfig) -> TaskRun:
    if not file.is_file():
        raise DataError(f"--predictions {file.parent} has no {file.name}.")
    run = TaskRun(name, [])
    for where, value in read_json_lines(file):
        if config.data == HUB and len(run.rows) == config.limit:
            break
        text = value.get("pred", value)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: no text under 'pred' (found: {', '.join(sorted(value))}).")
        run.rows.append(LongBenchRow(str(len(run.rows) + 1), "", "", *answers_of(where, value)))
        run.answers.append(text)
    return run


def _match(run: TaskRun, rows: list[LongBenchRow], config: LongBenchConfig) -> None:
    """Give each row of the data the next answer that was scored against the same references.

    Predictions name no row, and the references are all that a score depends on.
    """
    waiting: defaultdict[tuple[str, ...], deque[str | None]] = defaultdict(deque)
    for row, answer in zip(run.rows, run.answers, strict=True):
        waiting[row.answers].append(answer)
    matched = [waiting[row.answers].popleft() if waiting[row.answers] else None for row in rows]
    left = sum(map(len, waiting.values()))
    if left and config.limit is None:
        raise DataError(
            f"{left} of {len(run.rows)} predictions for {run.name} are for rows that {config.data} does not have."
        )
    run.rows, run.answers = rows, matched


# --- scores and record ------------------------------------------------------------------------------------------------


def score_runs(runs: Sequence[TaskRun], config: LongBenchConfig) -> list[TaskScore]:
    """Return the score of every task."""
    scores = []
    for run in runs:
        score = score_task(
            run.name, run.answers, run.rows, ratio=config.code_similarity, longbench_e=config.longbench_e
        )
        if run.predictions:
            tokens = sum(prediction.num_prompt_tokens for prediction in run.predictions) / len(run.predictions)
            score = dataclasses.replace(score, num_truncated=run.num_truncated, num_prompt_tokens=tokens)
        scores.append(score)
    return scores


def score_notes(scores: Sequence[TaskScore], config: LongBenchConfig) -> list[str]:
    """Return what a reader of the scores has to know: answers that are missing or empty, rows that are."""
    notes = []
    for what, count in (("no answer", "num_missing"), ("an empty answer", "num_empty"), ("no length", "num_unplaced")):
        own = [score for score in scores if getattr(score, count)]
        listed = ", ".join(f"{getattr(score, count)} of the {score.num_rows} of {score.task}" for score in own)
        place = f" in {config.predictions}" if config.predictions and count != "num_unplaced" else ""
        fate = "in no bucket" if count == "num_unplaced" else "scored as they are: 0 in nearly every metric"
        fate = "scored 0" if count == "num_missing" else fate
        notes += [f"Rows with {what}{place}: {listed} ({fate})."] if own else []
    fewer = [score.task for score in scores if score.num_rows < TASKS[score.task].num_rows]
    if fewer and not config.longbench_e:
        which = "every task here" if len(fewer) == len(scores) else ", ".join(fewer)
        notes.append(f"Fewer rows than LongBench has: {which}. These scores are not comparable with published ones.")
    return notes


def model_notes(model: LanguageModel, runs: Sequence[TaskRun], config: LongBenchConfig) -> list[str]:
    """Return what may spoil answers: prompts beyond the model's positions, cut answers, thoughts, control tokens."""
    notes = []
    positions = model.context_length
    beyond = sum(len(r.input_ids) + r.max_new_tokens > positions for run in runs for r in run.requests)
    if beyond and not config.memory:
        notes.append(f"Prompts that with their answers go beyond the model's {positions:,} positions: {beyond}.")
    return [*notes, *answer_notes([own for run in runs for own in run.predictions], empty=False)]


def data_facts(config: LongBenchConfig, runs: Sequence[TaskRun]) -> dict[str, Any]:
    """Return what a record says of the rows: where they lay, and the hashes of each task's."""
    return {
        "source": config.predictions or config.data,
        "sha256": {run.name: rows_hash(run.rows) for run in runs},
        "references_sha256": {run.name: references_hash(run.rows) for run in runs},
    }


def longbench_record(
    model: LanguageModel | None,
    runs: Sequence[TaskRun],
    scores: Sequence[TaskScore],
    config: LongBenchConfig,
    notes: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Return the JSON record; `model` is None where the answers were given."""
    limit = prompt_limit(model, config) if model else None
    protocol: dict[str, Any] = {
        "id": f"longbench{'-e' if config.longbench_e else ''}-official",
        "definition": "answers to the authors' prompts, greedy; the best score over the references, mean x 100",
        "reference": _REFERENCE,
        "code_similarity": config.code_similarity,
        "limit": config.limit,
    }
    if model:
        protocol |= {
            "max_length": limit,
            "truncation": "the first and the last half of max_length tokens, decoded, joined and encoded again",
            "chat_template": uses_chat(model, config),
            **asked_facts(
                model, uses_chat(model, config), (own.prompt_sha256 for run in runs for own in run.predictions)
            ),
            "prompts": {run.name: prompt_hash(read_prompt(run.name)) for run in runs},
            "prompts_from": f"lm-eval {importlib.metadata.version('lm-eval')}, white space as published",
        }
    return result_record(
        "longbench",
        model.describe() if model else {"id": config.model or None, "answers_from": config.predictions},
        protocol,
        data_facts(config, runs),
        seconds=seconds,
        results=[score_entry(score) for score in scores],
        averages=all_averages(scores, config.longbench_e),
        average_intervals=average_intervals(scores, config.longbench_e),
        notes=list(notes),
    )
