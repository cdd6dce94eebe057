"""Ask for one line of many, or the first topic of a conversation: accuracy by size with Wilson intervals.

Example: longext eval longeval MODEL --data longeval/ --tasks lines --sizes 200,300

Published answers: longext eval longeval --predictions 200_response.txt
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.data.json_lines import repeated_note, rows_of, text_fields
from longext.errors import ConfigError, DataError
from longext.evals.base import GivenAnswers, check_tasks, fail_under, register
from longext.evals.limits import PLACES, Place
from longext.evals.ranks import Choices, ranked_view
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, text_hash
from longext.evals.ruler.words import NUM_NAMES, draw_different, draw_name
from longext.evals.views import MEAN_TOKENS, Detail, Section, by_task
from longext.models.protocol import LanguageModel
from longext.registry import Registry
from longext.settings import MANY, option
from longext.untrusted import numbered_lines

if TYPE_CHECKING:
    import numpy as np

_FORM = PLACES.replace("LENGTH", "SIZE")
_COMPLETION_TOKENS = 15
_GENERATED_SIZES = (20, 50, 100)
_PUBLISHED_LINE = re.compile(r"^Label: (.*?), Predict: (.*?)(?:, Parsed: (-?\d+))?, prompt length: (-?\d+)$")
_KIND = "case of LongEval"
_WHERE = "LMSYS's are in longeval/evaluation of github.com/DachengLi1/LongChat; lines can be generated (no --data)."
LINES, TOPICS = "lines", "topics"
_LINE_NUMBER = re.compile(r"REGISTER_CONTENT is <(\d+)>")
_MOST_OTHERS = 9  # candidates that the right number or topic is ranked among
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
        others: further numbers or topics of the case.
    """

    task: str
    size: int
    prompt: str
    expected: str
    key: str
    others: tuple[str, ...] = ()


def _last_integer(expected: str, answer: str) -> float:
    digits, wanted = re.findall(r"\d+", answer), int(expected)
    last = digits[-1].lstrip("0") if digits else None
    return float(last is not None and len(last) <= len(expected) and int(last or 0) == wanted)


def _names_topic(expected: str, answer: str) -> float:
    return float(" ".join(expected.lower().split()) in " ".join(answer.lower().split()))


@dataclass(frozen=True)
class LongEvalTask:
    """What is asked for.

    Attributes:
        max_new_tokens: budget of an answer.
        opening: the beginning of the answer, for models that only continue.
        score: (what is expected, answer) -> 1 if it is right, else 0. LMSYS's own rule for lines: the last run of
            digits is the number. Topics are judged by GPT-3.5 or by eye there; here the topic must be in the answer,
            case ignored (as FlagEmbedding's re-use of the cases has it): the two are not comparable.
    """

    max_new_tokens: int
    opening: str
    score: Callable[[str, str], float]


LONGEVAL_TASKS: Registry[LongEvalTask] = Registry("task")
LONGEVAL_TASKS.register(LINES, LongEvalTask(100, "Line <{key}>: <REGISTER_CONTENT> is", _last_integer))
LONGEVAL_TASKS.register(TOPICS, LongEvalTask(50, "\n ASSISTANT: The first topic is", _names_topic))


@register("longeval")
@dataclass(frozen=True, kw_only=True)
class LongEval(RetrievalEval):
    """LMSYS's line and topic retrieval (lmsys.org/blog/2023-06-29-longchat).

    Lines: a record of lines "line KEY: REGISTER_CONTENT is <NUMBER>", one number asked for. Topics: a conversation
    about several topics, the first asked for. Cases are read from LMSYS's files, or lines are made here in the same
    form.
    """

    kind: ClassVar[str] = "longeval"
    unit: ClassVar[str] = "cases"
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="longeval",
            title="LongEval",
            views=(
                by_task(
                    "LongEval accuracy by number of lines or topics",
                    "results.score",
                    "number of lines or topics",
                    heading="size",
                    details=(MEAN_TOKENS, Detail("cases", "num_trials")),
                ),
                ranked_view("ranked", "number of lines or topics", heading="size"),
            ),
        ),
    )
    limit_form: ClassVar[str] = _FORM

    data: str | None = option(
        None, "Folder with <n>_lines.jsonl, <n>_topics.jsonl (default: lines are generated).", panel="Data"
    )
    tasks: tuple[str, ...] = option((LINES, TOPICS), "Of lines and topics, comma-separated.")
    sizes: tuple[int, ...] = option(
        (), "Numbers of lines or topics, comma-separated (default: all in --data; generated: 20,50,100).", ge=1
    )
    num_cases: int = option(50, "Cases of each size, at most.", ge=1, le=MANY)
    complete: bool = option(False, "Give the beginning of the answer, for models that only continue.")
    fail_under: tuple[str, ...] = fail_under(_FORM)

    def check(self) -> None:
        """Raise ConfigError for an unknown task, or options that exclude each other."""
        check_tasks(self.tasks, LONGEVAL_TASKS)
        if self.complete and (self.chat_template or self.template_arg):
            flag = "--chat-template" if self.chat_template else "--template-arg"
            raise ConfigError(
                f"--complete is for models that only continue, {flag} for those that answer: leave one out."
            )
        super().check()

    def read_data(self) -> list[LongEvalCase]:
        """Return the cases of --data, or generated lines.

        Raises:
            ConfigError, DataError: as `read_cases`; or topics without data.
        """
        if self.data is not None:
            return read_cases(self.data, self.tasks, self.sizes, self.num_cases)
        if LINES not in self.tasks:
            raise ConfigError("--tasks topics needs --data: LMSYS's conversations cannot be generated. lines can.")
        sizes = sorted(set(self.sizes or _GENERATED_SIZES))
        return [case for size in sizes for case in generate_lines(size, self.num_cases, self.seed)]

    def places(self, data: Sequence[LongEvalCase]) -> list[Place]:
        """Return the tasks and sizes of cases."""
        return [(case.task, str(case.size)) for case in data]

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return 1 for a right answer, else 0."""
        return LONGEVAL_TASKS[task].score(expected[0], answer)

    def read_answers(self, path: Path) -> GivenAnswers:
        """Return the scores of a file as LMSYS's script writes it, or of answers.jsonl of a run."""
        return super().read_answers(path) if path.suffix == ".jsonl" else score_published(path)

    def uses_chat(self, model: LanguageModel) -> bool:
        """Return True if questions go through the chat template; a completion is asked for without."""
        return not self.complete and super().uses_chat(model)

    def questions(self, model: LanguageModel, data: Sequence[LongEvalCase]) -> list[Question]:
        """Return the question of each case; with --complete, the beginning of the answer behind it."""
        numbers: dict[tuple[str, int], count[int]] = {}
        questions = []
        for case in data:
            task, number = LONGEVAL_TASKS[case.task], next(numbers.setdefault((case.task, case.size), count()))
            questions.append(
                Question(
                    id=f"{case.task}/{case.size}/{number}",
                    task=case.task,
                    length=case.size,
                    input_ids=self.prompt_tokens(model, prompt_text(case, self.complete)),
                    expected=(case.expected,),
                    max_new_tokens=_COMPLETION_TOKENS if self.complete else task.max_new_tokens,
                    stop=("\n",) if self.complete else (),
                    choices=self._choices(model, case),
                )
            )
        return questions

    def _choices(self, model: LanguageModel, case: LongEvalCase) -> Choices | None:
        """Return the number or topic and the others of its case, behind the beginning of the answer."""
        opening = LONGEVAL_TASKS[case.task].opening.format(key=case.key)
        form = "<{}>" if case.task == LINES else "{}"
        wrong = [form.format(other) for other in case.others[:_MOST_OTHERS]]
        return self.choices(model, case.prompt, opening, [form.format(case.expected)], wrong) if wrong else None

    def protocol(self, model: LanguageModel | None) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        definition = "greedy answers of up to 100 tokens (topics: 50)"
        if self.predictions:
            definition = "answers read from a file, scored here"
        elif self.complete:
            definition = f"greedy answers of one line, up to {_COMPLETION_TOKENS} tokens; their beginning is given"
        return {
            "id": "longeval",
            "definition": definition,
            "reference": "LongChat and LongEval, lmsys.org/blog/2023-06-29-longchat",
            "scoring": "lines: the last integer of the answer is the number (as LMSYS); topics: the first topic stands "
            "in the answer, case ignored (LMSYS: judged by GPT-3.5)",
            "seed": None if self.data or self.predictions else self.seed,
        }

    def data_facts(self, data: Sequence[LongEvalCase]) -> dict[str, Any]:
        """Return what the record says of the cases."""
        return {
            "data": self.data or "generated",
            "num_cases": len(data),
            "sha256": text_hash(case.prompt for case in data),
        }

    def notes(self, model: LanguageModel, data: Sequence[LongEvalCase], scores: Sequence[QuestionScore]) -> list[str]:
        """Return notes on tasks without cases, and cases that repeat."""
        missing = [task for task in self.tasks if task not in {case.task for case in data}]
        source = f"{self.data} has none" if self.data else "their conversations come with --data"
        absent = [f"{task.capitalize()} were not asked for: {source}." for task in missing]
        repeated = repeated_note((f"{case.size} {case.task}", case.prompt) for case in data)
        return [*absent, *repeated]


def score_published(path: Path) -> GivenAnswers:
    """Return the scores of a file of lines "Label: ..., Predict: ..., Parsed: ..., prompt length: ...".

    Lines of topics have no "Parsed".

    Raises:
        ConfigError: no such file.
        DataError: a line of another form, with its number.
    """
    if not path.is_file():
        raise ConfigError(f"--predictions must be a file of LongEval answers, got '{path}'.")
    named = re.match(r"(\d+)", path.name)
    size, stated, scores = int(named[1]) if named else 0, None, list[QuestionScore]()
    for where, line in numbered_lines(path):
        if line.startswith("Accuracy: "):
            stated = _accuracy(line, where)
            continue
        match = _PUBLISHED_LINE.match(line.rstrip())
        if match is None or (match[3] is not None and not match[1].isdecimal()):
            raise DataError(f"{where} is no answer: 'Label: ..., Predict: ..., prompt length: ...' is expected.")
        label, answer, parsed, length = match.groups()
        task = TOPICS if parsed is None else LINES
        score = LONGEVAL_TASKS[task].score(label, answer)
        scores.append(QuestionScore(task, size, None, score, int(length)))
    if not scores:
        raise DataError(f"{path} holds no answer.")
    notes = [] if stated is None else [f"The file itself states an accuracy of {stated:g}."]
    return GivenAnswers(scores=scores, facts={"stated_accuracy": stated}, notes=notes)


def _accuracy(line: str, where: str) -> float:
    try:
        return float(line.removeprefix("Accuracy: "))
    except ValueError as error:
        raise DataError(f"{where} gives no accuracy: '{line.strip()}'.") from error


def prompt_text(case: LongEvalCase, complete: bool) -> str:
    """Return the prompt; with `complete`, the beginning of the answer behind it."""
    return case.prompt + (LONGEVAL_TASKS[case.task].opening.format(key=case.key) if complete else "")


# --- cases ------------------------------------------------------------------------------------------------------------


def read_cases(folder: str, tasks: Sequence[str], sizes: Sequence[int], num_cases: int) -> list[LongEvalCase]:
    """Return the first `num_cases` cases of each file of `tasks` and `sizes` (all there are, if empty) in a folder.

    Files may be in sub-folders, as LMSYS has them (lines/testcases, topics/testcases).

    Raises:
        ConfigError: no folder, or no such size in it.
        DataError: a line that is no case, with file and number.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"--data must be a folder with <n>_lines.jsonl or <n>_topics.jsonl, got '{folder}'. {_WHERE}")
    files: dict[tuple[str, int], list[Path]] = {}
    for path in sorted(root.rglob("*.jsonl")):
        named = _NAMED.match(path.name)
        if named and named[2] in tasks and path.is_file():
            files.setdefault((named[2], int(named[1])), []).append(path)
    names = ", ".join(f"{size}_{task}.jsonl" for task, size in sorted(files)) or "none"
    if not files or not set(sizes) <= {size for _, size in files}:
        wanted = f"of {', '.join(map(str, sizes))} " if sizes else ""
        raise ConfigError(f"No cases {wanted}for --tasks {','.join(tasks)} in {root}; found there: {names}. {_WHERE}")
    chosen = sorted(key for key in files if not sizes or key[1] in sizes)
    for key in chosen:
        if len(files[key]) > 1:
            raise ConfigError(f"Two files of one name: {files[key][0]} and {files[key][1]}. Give --data one's folder.")
    read = {key: rows_of(files[key][0], partial(_case, *key), "a file", kind="case") for key in chosen}
    return [case for cases in read.values() for case in cases[:num_cases]]


def _case(task: str, size: int, where: str, value: Any) -> LongEvalCase:
    (prompt,) = text_fields(where, value, ("prompt",), _KIND)
    if task == TOPICS:
        first = _first_text(where, value, "topics")
        others = (topic for topic in value["topics"] if isinstance(topic, str) and topic != first)
        return LongEvalCase(task, size, prompt, first, "", tuple(dict.fromkeys(others)))
    number = value.get("expected_number")
    if not str(number).isdecimal():
        raise DataError(f"{where} is no {_KIND}: no whole number under 'expected_number'.")
    expected = str(int(str(number)))
    return LongEvalCase(
        task, size, prompt, expected, _first_text(where, value, "random_idx"), _others(prompt, expected)
    )


def _others(prompt: str, expected: str) -> tuple[str, ...]:
    """Return the numbers of the other lines, in an order that says nothing of the text's."""
    others = set(_LINE_NUMBER.findall(prompt)) - {expected}
    return tuple(sorted(others, key=lambda number: hashlib.sha256(f"{prompt}{number}".encode()).digest()))


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
    import numpy as np

    return [_generate(size, np.random.default_rng([seed, size, index])) for index in range(num_cases)]


def _generate(size: int, rng: np.random.Generator) -> LongEvalCase:
    taken: set[str] = set()
    keys = [draw_different(lambda: draw_name(rng), taken, NUM_NAMES) for _ in range(size)]
    numbers = rng.integers(1, _MAX_NUMBER + 1, size).tolist()
    asked = int(rng.integers(size))
    record = "".join(f"line {key}: REGISTER_CONTENT is <{number}>\n" for key, number in zip(keys, numbers, strict=True))
    prompt = _TASK_LINE + record + _QUESTION.format(key=keys[asked])
    expected = str(numbers[asked])
    return LongEvalCase(LINES, size, prompt, expected, keys[asked], _others(prompt, expected))
