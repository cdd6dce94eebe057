"""Answer questions on facts that are scattered in a long text: accuracy by task and length, heat map, JSON.

Example: longext eval babilong MODEL --data babilong/ --tasks qa1,qa2 --lengths 0k,4k
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longext.data.json_lines import repeated_note, rows_of, text_fields
from longext.errors import ConfigError
from longext.evals.base import check_tasks, register
from longext.evals.limits import Place
from longext.evals.ranks import ranked_view
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, text_hash
from longext.evals.views import SEVERAL, Column, Section, by_task, pooled, task_map
from longext.models.protocol import LanguageModel
from longext.registry import Registry, did_you_mean
from longext.settings import MANY, option

_ENDS = (".", "<context>", "<example>")  # what follows is not the answer
_WHERE = (
    "The Hub dataset RMT-team/babilong has a configuration for each length and a split for each task: "
    "`load_dataset('RMT-team/babilong', '4k', split='qa1').to_json('4k/qa1.jsonl')` (from datasets) writes a file."
)
ROOMS = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})
PEOPLE_AND_THINGS = frozenset({"Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"})


@dataclass(frozen=True)
class BABILongTask:
    """One task: every possible answer, and the parts of its prompt.

    Attributes:
        examples: (facts and question, answer).
        form: how the answer is to be given.
    """

    summary: str
    labels: frozenset[str]
    instruction: str
    examples: tuple[tuple[str, str], ...]
    form: str


_FACTS = "Somewhere in the text below stand short facts about {about}. Answer the question from these facts alone."
_ONE_WORD = "Answer with one word and nothing else."
BABILONG_TASKS: Registry[BABILongTask] = Registry("task")
BABILONG_TASKS.register(
    "qa1",
    BABILongTask(
        "where somebody is: one fact",
        ROOMS,
        _FACTS.format(about="where people are") + " Where somebody has been in several places, the last one counts.",
        (
            ("Nora went to the attic. Hugo went to the cellar. Where is Nora?", "Nora is in the attic."),
            (
                "Hugo went to the barn. Nora moved to the cellar. Hugo moved to the attic. Where is Hugo?",
                "Hugo is in the attic.",
            ),
        ),
        "Answer with one sentence of this form and nothing else: PERSON is in the PLACE.",
    ),
)
_CARRIED = (
    " A thing that somebody took goes where they go, until they put it down; from then on it stays where that was."
)
BABILONG_TASKS.register(
    "qa2",
    BABILongTask(
        "where a thing is: two facts",
        ROOMS,
        _FACTS.format(about="where people go and what they carry") + _CARRIED,
        (
            (
                "Nora went to the attic. Nora took the lamp. Nora moved to the barn. Where is the lamp?",
                "The lamp is in the barn.",
            ),
            (
                "Hugo took the rope. Hugo went to the cellar. Hugo dropped the rope. Where is the rope?",
                "The rope is in the cellar.",
            ),
        ),
        "Answer with one sentence of this form and nothing else: The THING is in the PLACE.",
    ),
)
BABILONG_TASKS.register(
    "qa3",
    BABILongTask(
        "where a thing was before: three facts",
        ROOMS,
        _FACTS.format(about="where people go and what they carry") + _CARRIED,
        (
            (
                "Nora took the lamp. Nora went to the attic. Nora moved to the barn. "
                "Where was the lamp before the barn?",
                "Before that the lamp was in the attic.",
            ),
            (
                "Hugo went to the cellar. Hugo took the rope. Hugo moved to the attic. Hugo dropped the rope. "
                "Where was the rope before the attic?",
                "Before that the rope was in the cellar.",
            ),
        ),
        "Answer with one sentence of this form and nothing else: Before that the THING was in the PLACE.",
    ),
)
BABILONG_TASKS.register(
    "qa4",
    BABILongTask(
        "which place lies beside another: two arguments",
        ROOMS,
        _FACTS.format(about="how places lie to each other"),
        (
            ("The attic is north of the barn. The cellar is south of the barn. What is north of the barn?", "attic"),
            ("The barn is west of the attic. The cellar is west of the barn. What is the barn west of?", "attic"),
        ),
        _ONE_WORD,
    ),
)
BABILONG_TASKS.register(
    "qa5",
    BABILongTask(
        "who gave what to whom: three arguments",
        PEOPLE_AND_THINGS,
        _FACTS.format(about="who gives what to whom"),
        (
            ("Nora took the lamp. Nora gave the lamp to Hugo. Who did Nora give the lamp to?", "Hugo"),
            ("Hugo took the rope. Hugo handed the rope to Iris. What did Hugo give to Iris?", "rope"),
            ("Iris took the lamp. Iris passed the lamp to Nora. Who gave the lamp?", "Iris"),
        ),
        _ONE_WORD,
    ),
)
PROMPTS: Registry[tuple[bool, bool]] = Registry("prompt")  # (has the instruction and form, has examples)
PROMPTS.register("examples", (True, True))
PROMPTS.register("instruction", (True, False))
PROMPTS.register("plain", (False, False))


def _folder(column: Column) -> str:
    return length_name(int(column))


@register("babilong")
@dataclass(frozen=True, kw_only=True)
class BABILong(RetrievalEval):
    """BABILong (arXiv 2406.10149): bAbI facts scattered in the text of books, and questions on them.

    Prompts are built as the authors build theirs, from an instruction, examples, the form of the answer, the text
    between <context> tags and the question, empty lines between them; the words of instructions and examples are
    longext's own.
    """

    kind: ClassVar[str] = "babilong"
    unit: ClassVar[str] = "rows"
    pools: ClassVar[tuple[str, ...]] = ("by_length",)
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="babilong",
            title="BABILong",
            views=(
                by_task(
                    "BABILong accuracy by length", "results.score", "length of the text", spell=_folder, picture=SEVERAL
                ),
                pooled("BABILong accuracy by length, all tasks together", spell=_folder),
                task_map("BABILong accuracy by length", "results.score", spell=_folder),
                ranked_view("ranked", "length of the text", spell=_folder),
            ),
        ),
    )

    data: str = option("", "Folder with <length>/<task>.jsonl, as 4k/qa1.jsonl.", panel="Data")
    tasks: tuple[str, ...] = option(("qa1", "qa2", "qa3", "qa4", "qa5"), "Of qa1 to qa5, comma-separated.")
    lengths: tuple[str, ...] = option((), "Lengths as the folders name them: 0k,4k (default: all in --data).")
    num_cases: int | None = option(None, "Rows of each task and length, at most.", ge=1, le=MANY)
    max_new_tokens: int = option(20, "Tokens of an answer.", ge=1)
    prompt: str = option(
        "examples", "instruction has no examples, plain is the text and the question:", names=lambda: PROMPTS
    )

    def check(self) -> None:
        """Raise ConfigError for an unknown task or prompt."""
        check_tasks(self.tasks, BABILONG_TASKS)
        PROMPTS[self.prompt]
        super().check()

    def read_data(self) -> list[BABILongRow]:
        """Return the rows."""
        return read_rows(self.data, self.tasks, self.lengths, self.num_cases)

    def places(self, data: Sequence[BABILongRow]) -> list[Place]:
        """Return the tasks and lengths of the rows."""
        return [(row.task, length_name(row.length)) for row in data]

    def spell(self, length: int) -> str:
        """Return the name of a length's folder."""
        return length_name(length)

    def questions(self, model: LanguageModel, data: Sequence[BABILongRow]) -> list[Question]:
        """Return the question of each row."""
        return [
            Question(
                id=row.id,
                task=row.task,
                length=row.length,
                input_ids=self.prompt_tokens(model, prompt_text(row, self.prompt), "\nAnswer:"),
                expected=(row.target,),
                max_new_tokens=self.max_new_tokens,
                choices=self.choices(
                    model,
                    prompt_text(row, self.prompt),
                    "\nAnswer:",
                    [row.target],
                    sorted(BABILONG_TASKS[row.task].labels - {row.target}),
                ),
                asked=row.question,
            )
            for row in data
        ]

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return the authors' verdict, 1 or 0."""
        return share_right(task, asked, expected[0], answer)

    def protocol(self, model: LanguageModel) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        return {
            "id": "babilong",
            "definition": f"greedy answers of up to {self.max_new_tokens} tokens; prompt: {self.prompt}, built as "
            "the authors' in longext's own words (figures compare with others made here); without a chat template "
            "'Answer:' follows the question",
            "reference": "BABILong, arXiv 2406.10149",
            "scoring": "the target is the only possible answer of the task that the first sentence names, case "
            "ignored, those in the question left out (as the authors)",
            "tasks": {name: BABILONG_TASKS[name].summary for name in self.tasks},
        }

    def data_facts(self, data: Sequence[BABILongRow]) -> dict[str, Any]:
        """Return what the record says of the rows."""
        texts = (f"{row.text}{row.question}{row.target}" for row in data)
        return {"data": self.data, "num_rows": len(data), "sha256": text_hash(texts)}

    def notes(self, model: LanguageModel, data: Sequence[BABILongRow], scores: Sequence[QuestionScore]) -> list[str]:
        """Return a note on rows that repeat."""
        rows = ((f"{row.task} at {length_name(row.length)}", (row.text, row.question)) for row in data)
        return repeated_note(rows)


@dataclass(frozen=True)
class BABILongRow:
    """One question: `length` is what the folder says, in tokens (4k: 4,000)."""

    id: str
    task: str
    length: int
    text: str
    question: str
    target: str


def parse_length(name: str) -> int | None:
    """Return the tokens that the name of a folder stands for: 0k, 4k, 1M; None for another name."""
    match = re.fullmatch(r"(\d+)([kM])", name)
    return int(match[1]) * (1000 if match[2] == "k" else 10**6) if match else None


def length_name(length: int) -> str:
    """Return the folder of a length: 4000 is "4k"."""
    return f"{length // 10**6}M" if length and length % 10**6 == 0 else f"{length // 1000}k"


def read_rows(folder: str, tasks: Sequence[str], lengths: Sequence[str], num_cases: int | None) -> list[BABILongRow]:
    """Return the first `num_cases` rows of each task at each length (all lengths there are, if empty).

    Raises:
        ConfigError: no such folder, length or file.
        DataError: a line that is no row, with file and number.
    """
    root = Path(folder).expanduser()
    if not folder or not root.is_dir():
        raise ConfigError(
            f"--data must be a folder with <length>/<task>.jsonl (4k/qa1.jsonl), got '{folder}'. {_WHERE}"
        )
    folders = sorted(
        (length, path) for path in root.iterdir() if path.is_dir() and (length := parse_length(path.name)) is not None
    )
    names = [path.name for _, path in folders]
    for name in lengths:
        if name not in names:
            raise ConfigError(f"No length '{name}' in {root}. {did_you_mean(name, names) if names else 'It is empty.'}")
    if not folders:
        raise ConfigError(f"No folder named after a length (0k, 4k, 1M) in {root}. {_WHERE}")
    chosen = [(length, path) for length, path in folders if not lengths or path.name in lengths]
    return [row for task in tasks for length, path in chosen for row in _read_file(path, task, length)[:num_cases]]


def _read_file(folder: Path, task: str, length: int) -> list[BABILongRow]:
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl") if file.is_file())) or "none"
        raise ConfigError(f"No file {path}. Tasks there: {names}. {_WHERE}")

    def row(where: str, value: Any) -> BABILongRow:
        parts = text_fields(where, value, ("input", "question", "target"), "row of BABILong")
        return BABILongRow(f"{task}/{folder.name}/{where.rpartition(':')[2]}", task, length, *parts)

    return rows_of(path, row, "a file")


def prompt_text(row: BABILongRow, prompt: str) -> str:
    """Return the prompt of a row, with the parts that `PROMPTS` names."""
    task = BABILONG_TASKS[row.task]
    has_instruction, has_examples = PROMPTS[prompt]
    examples = [f"<example>\n{facts}\nAnswer: {answer}\n</example>" for facts, answer in task.examples]
    parts = [task.instruction] if has_instruction else []
    parts += ["\n".join(examples)] if has_examples else []
    parts += [task.form] if has_instruction else []
    text = f"<context>\n{row.text.strip()}\n</context>\n\nQuestion: {row.question.strip()}"
    return "\n\n".join([*parts, text])


def share_right(task: str, question: str, target: str, answer: str) -> float:
    """Return the authors' verdict, 1 or 0: the target is the one possible answer that the first sentence names.

    Case is ignored; possible answers that the question names itself do not count.
    """
    text = answer.lower()
    for end in _ENDS:
        text = text.split(end)[0]
    labels = {label.lower() for label in BABILONG_TASKS[task].labels}
    named = {label for label in labels if label in text and label not in question.lower()}
    return float(named == {target.lower()})
