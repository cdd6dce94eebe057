"""Rows of LongBench: the authors' JSON-lines files in a folder, or their archive on the Hub; and answers to them."""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.data.json_lines import repeated_note
from longext.errors import DataError
from longext.evals.longbench.metrics import NEED_JIEBA, has_jieba
from longext.evals.longbench.tasks import TASKS
from longext.untrusted import json_lines

if TYPE_CHECKING:
    from longext.evals.suites.longbench import LongBench
    from longext.models.answers import Prediction, Request

HUB = "hub"
HUB_ID = "THUDM/LongBench"
_ARCHIVE = "data.zip"
_WHERE = (
    f"It is in {_ARCHIVE} of the Hub dataset {HUB_ID}: `hf download --repo-type dataset {HUB_ID} {_ARCHIVE}`, unpack "
    "it and give --data DIR/data."
)


@dataclass(frozen=True)
class LongBenchRow:
    """One question.

    Attributes:
        id: `_id` of the row, or its line number.
        question: `input`; empty in tasks without one.
        length: words (English) or characters (Chinese) as the authors counted them; None if unknown.
        all_classes: of classification tasks.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    length: int | None
    all_classes: tuple[str, ...]


@dataclass
class TaskRun:
    """One task of a run.

    Attributes:
        answers: to each row, None if one is missing.
        requests: the prompts; none if the answers were given, as of the next two.
        is_cut: whether each prompt lost its middle.
        predictions: the answers with what is known of their making.
    """

    name: str
    rows: list[LongBenchRow]
    answers: list[str | None] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    is_cut: list[bool] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)

    def answered(self, answers: Mapping[int, Prediction]) -> TaskRun:
        """Return the rows that were asked, by number, with their answers."""
        numbers = sorted(answers)
        return TaskRun(
            self.name,
            [self.rows[i] for i in numbers],
            [answers[i].text for i in numbers],
            [self.requests[i] for i in numbers],
            [self.is_cut[i] for i in numbers],
            [answers[i] for i in numbers],
        )


def file_stem(task: str, longbench_e: bool) -> str:
    """Return what the authors call the data of a task: <task>, or <task>_e."""
    return f"{task}_e" if longbench_e else task


def longbench_files(data: str, names: Sequence[str]) -> dict[str, Path | zipfile.Path]:
    """Return the file of each of `names` (<task> or <task>_e) that `data` has: a folder, or `hub`.

    Raises:
        DataError: no such folder, a folder in place of a file, or the archive cannot be fetched from the Hub.
    """
    folder: Path | zipfile.Path
    if data == HUB:
        folder = zipfile.Path(_fetch_archive(), "data/")
    else:
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise DataError(f"No folder '{data}' with LongBench's files. {_WHERE}")
    files = {name: folder / f"{name}.jsonl" for name in names}
    for file in files.values():
        if file.is_dir():
            raise DataError(f"{file} is a folder; it must be a file of JSON lines.")
    return {name: file for name, file in files.items() if file.is_file()}


def missing_file(name: str, data: str) -> DataError:
    """Return the error that says which file of LongBench `data` lacks, and where to get it."""
    return DataError(f"{data} has no {name}.jsonl. {_WHERE}")


def _fetch_archive() -> str:
    from huggingface_hub import hf_hub_download

    try:
        path: str = hf_hub_download(HUB_ID, _ARCHIVE, repo_type="dataset")
    except Exception as error:  # offline, unreachable, gone: many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"LongBench cannot be fetched from the Hub ({reason}). {_WHERE}") from error
    return path


def _lines(file: Path | zipfile.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return json_lines(file, form="{}, line {}", want=dict)


def read_longbench(file: Path | zipfile.Path, limit: int | None = None) -> list[LongBenchRow]:
    """Return the first `limit` rows of one task.

    Raises:
        DataError: a broken line (with file and number), a row without a field of the schema, or no row.
    """
    lines = itertools.islice(_lines(file), limit)
    rows = [_row(where, value, number) for number, (where, value) in enumerate(lines, 1)]
    if not rows:
        raise DataError(f"{file} has no rows.")
    return rows


def _row(where: str, value: dict[str, Any], number: int) -> LongBenchRow:
    for key in ("input", "context"):
        if not isinstance(value.get(key), str):
            raise DataError(f"{where}: no text under '{key}' (found: {', '.join(sorted(value))}).")
    return LongBenchRow(str(value.get("_id") or number), value["input"], value["context"], *_references(where, value))


def _references(where: str, value: dict[str, Any]) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """Return (answers, length, all classes) of a row or of a line of predictions."""
    answers, length, classes = value.get("answers"), value.get("length"), value.get("all_classes") or []
    if not _is_texts(answers) or not answers:
        raise DataError(f"{where}: 'answers' must be a list of texts.")
    if not _is_texts(classes):
        raise DataError(f"{where}: 'all_classes' must be a list of texts or null.")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise DataError(f"{where}: 'length' must be a whole number or null.")
    return tuple(answers), length, tuple(classes)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# --- of a run ---------------------------------------------------------------------------------------------------------


def load_tasks(config: LongBench) -> tuple[list[TaskRun], list[str]]:
    """Return the tasks to be run with their rows, and notes on those that were left out.

    Raises:
        DataError: a task of --tasks has no file, no task has one, or a file cannot be read.
    """
    stems = {name: file_stem(name, config.longbench_e) for name in config.wanted}
    files = longbench_files(config.data, list(stems.values()))
    missing = [name for name in stems if stems[name] not in files]
    if missing and (config.tasks or len(missing) == len(stems)):
        raise missing_file(stems[missing[0]], config.data)
    runs = [TaskRun(name, read_longbench(files[stem], config.limit)) for name, stem in stems.items() if stem in files]
    notes = [f"{config.data} has no file for {', '.join(missing)}: left out."] if missing else []
    rows = ((run.name, (row.question, row.context)) for run in runs for row in run.rows)
    return runs, [*notes, *_jieba_note(config), *repeated_note(rows)]


def _jieba_note(config: LongBench) -> list[str]:
    needing = [name for name in TASKS if TASKS[name].metric in NEED_JIEBA]
    if config.tasks or config.longbench_e or has_jieba():
        return []
    return [f"{', '.join(needing)} are scored on the words that jieba finds (pip install jieba): left out."]


def read_answers(config: LongBench) -> tuple[list[TaskRun], list[str]]:
    """Return tasks and answers as <task>.jsonl files of `--predictions` hold them, in the authors' schema.

    With `--data FOLDER` the rows are those of the data: a row that no answer is for is missing and scores 0.

    Raises:
        DataError: no such folder or file, a line that cannot be read, or answers to other rows.
    """
    folder = Path(str(config.predictions)).expanduser()
    if not folder.is_dir():
        raise DataError(f"--predictions {folder} is no folder. Give one with <task>.jsonl files of pred and answers.")
    names = [name for name in config.wanted if config.tasks or (folder / f"{name}.jsonl").is_file()]
    if not names:
        raise DataError(f"--predictions {folder} has no file named after a task (<task>.jsonl) that can be scored.")
    runs = [_read_answers(folder / f"{name}.jsonl", name, config) for name in names]
    if config.data != HUB:
        stems = [file_stem(name, config.longbench_e) for name in names]
        files = longbench_files(config.data, stems)
        for run, stem in zip(runs, stems, strict=True):
            if stem not in files:
                raise missing_file(stem, config.data)
            _match(run, read_longbench(files[stem], config.limit), config)
    empty = [run.name for run in runs if not run.rows]
    if empty:
        raise DataError(f"{folder / empty[0]}.jsonl has no predictions.")
    left_out = [name for name in TASKS if name not in names and (folder / f"{name}.jsonl").is_file()]
    return runs, (_jieba_note(config) if any(TASKS[name].metric in NEED_JIEBA for name in left_out) else [])


def _read_answers(file: Path, name: str, config: LongBench) -> TaskRun:
    if not file.is_file():
        raise DataError(f"--predictions {file.parent} has no {file.name}.")
    run = TaskRun(name, [])
    for where, value in _lines(file):
        if config.data == HUB and len(run.rows) == config.limit:
            break
        text = value.get("pred", value)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: no text under 'pred' (found: {', '.join(sorted(value))}).")
        run.rows.append(LongBenchRow(str(len(run.rows) + 1), "", "", *_references(where, value)))
        run.answers.append(text)
    return run


def _match(run: TaskRun, rows: list[LongBenchRow], config: LongBench) -> None:
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


# --- what a record says of them ---------------------------------------------------------------------------------------


def rows_hash(rows: Sequence[LongBenchRow]) -> str:
    """Return a SHA-256 over rows, so that two results can be told to be on the same data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.question, row.context, row.answers, row.length, row.all_classes]).encode())
    return digest.hexdigest()


def references_hash(rows: Sequence[LongBenchRow]) -> str:
    """Return a SHA-256 over what answers are scored against, in any order; published answers hold no more."""
    scored = sorted(json.dumps([row.answers, row.length, row.all_classes]) for row in rows)
    return hashlib.sha256("\n".join(scored).encode()).hexdigest()
