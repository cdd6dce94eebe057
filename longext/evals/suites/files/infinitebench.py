"""Twelve tasks on texts of 100k tokens and more: InfiniteBench from local files, as its authors score them.

Example: longext eval infinitebench MODEL --data InfiniteBench/ --tasks passkey,longbook_choice_eng

Published answers: longext eval infinitebench --predictions results/gpt4
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.data.json_lines import text_fields
from longext.errors import ConfigError, DataError
from longext.evals.base import GivenAnswers, check_tasks, register
from longext.evals.limits import Place
from longext.evals.longbench.cutting import cut_prompt, prompt_limit
from longext.evals.longbench.infinitebench import INFINITE_TASKS, label_of, prompt_of
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, rated, text_hash
from longext.evals.views import Bars, Detail, Score, Section
from longext.settings import LENGTH, option
from longext.untrusted import json_lines

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel

_OPTIONS = {"longbook_choice_eng", "code_debug"}  # four of them, A to D
_WHERE = "The files are those of the Hub dataset xinrongzhang2022/InfiniteBench, one <task>.jsonl for each task."
_PREFIX = "preds_"  # of the authors' files of answers
Row = Mapping[str, Any]


def _title(score: Score) -> str:
    return INFINITE_TASKS[str(score.field("task"))].title


@register("infinitebench")
@dataclass(frozen=True, kw_only=True)
class InfiniteBench(RetrievalEval):
    """InfiniteBench (arXiv 2402.13718): retrieval, books, dialogue, code and numbers in 12 tasks."""

    kind: ClassVar[str] = "infinitebench"
    unit: ClassVar[str] = "questions"
    has_shares: ClassVar[bool] = False
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="infinitebench",
            title="InfiniteBench",
            views=(
                Bars(
                    "InfiniteBench by task",
                    of="results.score",
                    columns=_title,
                    heading="task",
                    details=(Detail("questions", "num_trials"), Detail("tokens", "num_tokens", "{:,.0f}")),
                ),
            ),
        ),
    )
    limit_form: ClassVar[str] = "SCORE or TASK=SCORE"

    data: str = option("", "Folder with the published rows, <task>.jsonl.", panel="Data")
    tasks: tuple[str, ...] = option((), "Tasks, comma-separated (default: those with a file; math_calc has no prompt).")
    max_length: int | None = option(
        None, "Tokens of a prompt; longer ones lose their middle (default: by the context).", ge=2, le=LENGTH
    )
    limit: int | None = option(None, "Only the first rows of each task.", ge=1)

    def check(self) -> None:
        """Raise ConfigError for an unknown task, or one without a prompt or without wrong answers."""
        if self.tasks:
            check_tasks(self.tasks, INFINITE_TASKS)
        if self.predictions is None and "math_calc" in self.tasks:
            raise ConfigError(
                "math_calc has no prompt in lm-eval, where they are read from: score --predictions of it."
            )
        if self.ranks and not (self.tasks and set(self.tasks) <= _OPTIONS):
            names = ",".join(sorted(_OPTIONS))
            raise ConfigError(f"--answers {self.answers} needs wrong answers, which few tasks have: --tasks {names}.")
        super().check()

    def read_data(self) -> dict[str, list[Row]]:
        """Return the rows of each task."""
        return read_rows(self.data, self.tasks, self.limit)

    def places(self, data: Mapping[str, Sequence[Row]]) -> list[Place]:
        """Return the tasks."""
        return [(task, "") for task in data]

    def spell(self, length: int) -> str:
        """Return nothing: texts have the lengths that they have."""
        return ""

    def questions(self, model: LanguageModel, data: Mapping[str, Sequence[Row]]) -> list[Question]:
        """Return the question of each row, its prompt cut in the middle where it is too long."""
        return [
            self._question(model, task, row, number) for task, rows in data.items() for number, row in enumerate(rows)
        ]

    def _question(self, model: LanguageModel, task: str, row: Row, number: int) -> Question:
        text, is_cut = cut_prompt(model, self, prompt_of(task, row))
        label = label_of(task, row)
        right = label[1] if task in _OPTIONS else ""
        expected = (json.dumps(label, ensure_ascii=False),)
        return Question(
            id=f"{task}/{number}",
            task=task,
            length=0,
            input_ids=self.prompt_tokens(model, text, "\n\n"),
            expected=expected,
            max_new_tokens=INFINITE_TASKS[task].max_new_tokens,
            is_cut=is_cut,
            choices=self.choices(model, text, "\n\nAnswer:", [right], [each for each in "ABCD" if each != right])
            if right
            else None,
        )

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return the authors' score; `expected` is the label as JSON."""
        return INFINITE_TASKS[task].score(answer, json.loads(expected[0]))

    def read_answers(self, path: Path) -> GivenAnswers:
        """Return the scores of the authors' preds_<task>.jsonl, of a folder of them, or of answers.jsonl of a run."""
        files = sorted(path.glob(f"{_PREFIX}*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"{path} holds no {_PREFIX}<task>.jsonl.")
        if not files[0].stem.startswith(_PREFIX):
            return super().read_answers(path)
        named = {file.stem.removeprefix(_PREFIX): file for file in files}
        wanted = [task for task in INFINITE_TASKS if task in named and task in (self.tasks or named)]
        known = {task: named[task] for task in wanted}
        scores = [_published(task, where, row) for task, file in known.items() for where, row in json_lines(file)]
        if not scores:
            raise DataError(f"{path} holds no answer to a task of InfiniteBench: {', '.join(INFINITE_TASKS)}.")
        left = sorted(set(named) - set(INFINITE_TASKS))
        return GivenAnswers(scores=scores, notes=[f"Left out, no task: {', '.join(left)}."] if left else [])

    def protocol(self, model: Any) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        return {
            "id": "infinitebench",
            "definition": "the authors' GPT-4 prompts as lm-eval has them; longer ones lose their middle; greedy",
            "reference": "InfiniteBench, arXiv 2402.13718",
            "scoring": "the authors' compute_scores.py, task by task; intervals over questions",
            "max_length": self.max_length if model is None else prompt_limit(model, self),
            "limit": self.limit,
        }

    def data_facts(self, data: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
        """Return what the record says of the rows."""
        texts = (f"{task}{row['context']}{row['input']}{row['answer']}" for task, rows in data.items() for row in rows)
        return {"data": self.data, "num_rows": sum(map(len, data.values())), "sha256": text_hash(texts)}


def _published(task: str, where: str, row: Any) -> QuestionScore:
    """Return the score of a line as the authors write it."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is no answer of InfiniteBench.")
    label = row.get("ground_truth", row.get("label"))
    (answer,) = text_fields(where, row, ("prediction" if "prediction" in row else "pred",), "answer")
    score = rated(where, f"InfiniteBench's {task}", partial(INFINITE_TASKS[task].score, answer, label))
    return QuestionScore(task, 0, None, score, 0)


def read_rows(folder: str, tasks: Sequence[str], limit: int | None) -> dict[str, list[Row]]:
    """Return the first rows of each task.

    Raises:
        ConfigError, DataError: no such folder or file, or a row of another form, with its place.
    """
    path = Path(folder).expanduser()
    if not folder or not path.is_dir():
        raise ConfigError(f"--data must be a folder with InfiniteBench's <task>.jsonl, got '{folder}'. {_WHERE}")
    there = [task for task in INFINITE_TASKS if (path / f"{task}.jsonl").is_file()]
    named = tasks or [task for task in there if INFINITE_TASKS[task].file]
    missing = [task for task in named if task not in there]
    if missing or not named:
        raise ConfigError(f"No {missing[0] if missing else '<task>'}.jsonl in {path}. {_WHERE}")
    rows = {
        task: [_row(task, where, value) for where, value in json_lines(path / f"{task}.jsonl")][:limit]
        for task in named
    }
    empty = next((task for task, own in rows.items() if not own), None)
    if empty:
        raise DataError(f"{path / empty}.jsonl holds no row.")
    return rows


def _row(task: str, where: str, value: Any) -> Row:
    context, asked = text_fields(where, value, ("context", "input"), "row of InfiniteBench")
    options = value.get("options")
    row = {"context": context, "input": asked, "answer": value.get("answer"), "options": options}
    has_options = isinstance(options, list) and len(options) == 4 and all(isinstance(each, str) for each in options)
    try:
        if row["answer"] is None or (task in _OPTIONS and not has_options):
            raise ValueError
        label = label_of(task, row)
        INFINITE_TASKS[task].score("", label)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise DataError(f"{where} is no row of InfiniteBench's {task}: its answer or options.") from error
    return row
