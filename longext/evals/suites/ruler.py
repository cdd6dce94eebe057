"""RULER's 13 tasks as NVIDIA makes and scores them: score by length, effective length with its interval; offline.

Example: longext eval ruler MODEL --lengths 4096,8192 --num-trials 25

A model that does not answer yet: longext eval ruler books-5m --lengths 1024 --answers likelihood
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.data.json_lines import text_fields
from longext.errors import ConfigError, DataError
from longext.evals.base import GivenAnswers, check_tasks, register
from longext.evals.limits import ALL, check_lengths
from longext.evals.ranks import ranked_view
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, opened_tokens
from longext.evals.ruler.tasks import REACHED, RULER_TASKS, ruler_score
from longext.evals.views import NEVER, SEVERAL, Bars, Section, by_task, pooled, task_map
from longext.models.chat import chat_frame
from longext.settings import LENGTH, MANY, option
from longext.untrusted import json_lines

if TYPE_CHECKING:
    from longext.evals.ruler.samples import Sample, Sources
    from longext.models.protocol import LanguageModel

_SAFE_LENGTH = re.compile(r"(?:^|\D)(\d{3,7})(?:\D|$)")


@register("ruler")
@dataclass(frozen=True, kw_only=True)
class Ruler(RetrievalEval):
    """RULER (arXiv 2404.06654): needles, variables, common and frequent words, questions on paragraphs.

    Samples are drawn as NVIDIA's generators draw them; words, essays and questions are longext's own unless others are
    given. The mean of the 13 tasks says up to where the context is used.
    """

    kind: ClassVar[str] = "ruler"
    pools: ClassVar[tuple[str, ...]] = ("by_task", "by_length")
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="ruler",
            title="RULER",
            views=(
                by_task("RULER by task and prompt length", "by_task.score", picture=SEVERAL),
                pooled(
                    "RULER, mean over its tasks",
                    note=f"a length counts as effective at {REACHED:.1%}, what Llama-2-7B-chat has at 4K",
                ),
                task_map("RULER by task and prompt length", "by_task.score"),
                Bars(
                    "RULER, effective length in tokens",
                    of="effective.tokens",
                    unit="count",
                    columns=lambda score: "tokens",
                    name="effective",
                    picture=NEVER,
                ),
                ranked_view(),
            ),
        ),
    )

    tasks: tuple[str, ...] = option((), "Of RULER's 13, comma-separated (default: all).")
    lengths: tuple[int, ...] = option(
        (1024, 2048, 4096), "Most tokens of prompt and answer budget together, comma-separated.", le=LENGTH
    )
    num_trials: int = option(10, "Samples per task and length (NVIDIA: 500).", ge=1, le=MANY)
    words: str = option("own", "Words and ends of sentences:", names=lambda: _word_lists(), panel="Data")
    essays: str = option("book", "book (the bundled story), a text file, or a folder of them.", panel="Data")
    squad: str | None = option(
        None, "dev-v2.0.json of SQuAD for qa_1 (default: longext's own questions).", panel="Data"
    )
    hotpotqa: str | None = option(
        None, "hotpot_dev_distractor_v1.json for qa_2 (default: longext's own questions).", panel="Data"
    )
    answer_prefix: bool = option(
        True,
        "End prompts with the beginning of the answer, as RULER (never inside a thought).",
        "--answer-prefix",
        "--no-answer-prefix",
    )

    @property
    def wanted(self) -> tuple[str, ...]:
        """Return the tasks, all 13 if none is named."""
        return self.tasks or tuple(RULER_TASKS)

    def check(self) -> None:
        """Raise ConfigError for an unknown task or word list, or lengths that are too short."""
        check_tasks(self.wanted, RULER_TASKS)
        _word_lists()[self.words]
        check_lengths(self.lengths, minimum=128)
        super().check()

    def read_data(self) -> Sources:
        """Return words, essays and questions."""
        from longext.evals.ruler.sources import read_sources

        return read_sources(self.words, self.essays, self.squad, self.hotpotqa)

    def opens(self, model: LanguageModel) -> bool:
        """Return True if a prompt ends with the beginning of the answer: by --answer-prefix, but never in a thought."""
        return self.answer_prefix and not (self.uses_chat(model) and chat_frame(model).thinks)

    def questions(self, model: LanguageModel, data: Sources) -> list[Question]:
        """Return every prompt that fits; the same seed gives the same ones for every model of one tokenizer.

        Raises:
            ConfigError: no task fits a length.
        """
        from longext.evals.ruler.samples import TooShort

        questions: list[Question] = []
        for length in sorted(self.lengths):
            before = len(questions)
            for name in self.wanted:
                try:
                    samples = self._samples(model, data, name, length)
                except TooShort as error:
                    reason = str(error)
                    continue
                questions += [self._question(model, name, length, i, each) for i, each in enumerate(samples)]
            if len(questions) == before:
                raise ConfigError(f"{reason} Give longer --lengths.")
        return questions

    def _samples(self, model: LanguageModel, data: Sources, name: str, length: int) -> list[Sample]:
        from longext.evals.ruler.samples import ruler_samples

        overhead = len(self._ids(model, "", ""))
        return ruler_samples(
            name,
            data,
            length=length,
            number=self.num_trials,
            seed=self.seed,
            count=lambda text, opening: len(self._ids(model, text, opening)) - overhead,
            overhead=overhead,
        )

    def _ids(self, model: LanguageModel, text: str, opening: str) -> tuple[int, ...]:
        return opened_tokens(model, self.uses_chat(model), text, opening if self.opens(model) else "")

    def _question(self, model: LanguageModel, name: str, length: int, index: int, sample: Sample) -> Question:
        task, answers = RULER_TASKS[name], sample.answers
        input_ids = self._ids(model, sample.text, sample.opening)
        assert len(input_ids) + task.max_new_tokens <= length, "a sample is longer than its budget"
        right = answers[:1] if task.is_any else answers
        return Question(
            id=f"{name}/{length}/{index}",
            task=name,
            length=length,
            input_ids=input_ids,
            expected=answers,
            max_new_tokens=task.max_new_tokens,
            choices=self.choices(model, sample.text, sample.opening, right, sample.wrong),
        )

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return RULER's score."""
        return ruler_score(task, expected, answer)

    # --- answers that are given ---------------------------------------------------------------------------------

    def read_answers(self, path: Path) -> GivenAnswers:
        """Return the scores of answers.jsonl of a run, or of NVIDIA's folder with <task>.jsonl.

        A length in the name of a folder ("4096/pred/vt.jsonl") is that of its samples.
        """
        if not path.is_dir():
            return super().read_answers(path)
        files = [file for file in sorted(path.rglob("*.jsonl")) if file.stem in RULER_TASKS]
        scores = [score for file in files for score in self._of_nvidia(file, path)]
        if not scores:
            raise DataError(f"{path} holds no answers to RULER: files <task>.jsonl with 'pred' and 'outputs'.")
        return GivenAnswers(scores=scores)

    def _of_nvidia(self, file: Path, root: Path) -> list[QuestionScore]:
        found = [match[1] for part in file.relative_to(root.parent).parts[:-1] if (match := _SAFE_LENGTH.search(part))]
        length, scores = int(found[-1]) if found else 0, []
        for where, row in json_lines(file):
            (answer,) = text_fields(where, row, ("pred",), "answer to RULER")
            expected = row.get("outputs")
            if not isinstance(expected, list) or not expected or not all(isinstance(each, str) for each in expected):
                raise DataError(f"{where} is no answer to RULER: no list of texts under 'outputs'.")
            scores.append(QuestionScore(file.stem, length, None, ruler_score(file.stem, expected, answer), 0))
        return scores

    # --- the record ---------------------------------------------------------------------------------------------

    def tables(self, scores: Sequence[QuestionScore]) -> dict[str, Any]:
        """Return the tables, each length with the mean of its tasks, and the effective length."""
        tables = super().tables(scores)
        tables["by_length"] = means_by_length(tables["by_task"])
        return {**tables, "effective": effective_length(tables["by_length"])}

    def protocol(self, model: Any) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        return {
            "id": "ruler",
            "definition": "samples drawn as NVIDIA/RULER draws them (what stands around a prompt counts in its "
            "length); greedy answers; scores: the share of references in the answer, qa: any of them",
            "reference": "RULER, arXiv 2404.06654; NVIDIA/RULER",
            "tasks": {name: _told(name) for name in self.wanted},
            "lengths": sorted(self.lengths),
            "num_trials": self.num_trials,
            "words": self.words,
            "questions": "longext's own" if self.squad is None and self.hotpotqa is None else "given",
            "answer_prefix": model is None or self.opens(model),
            "reached_at": REACHED,
            "seed": self.seed,
        }

    def data_facts(self, data: Sources) -> dict[str, Any]:
        """Return what the record says of words, essays and questions."""
        from longext.evals.ruler.sources import facts_of

        return facts_of(data, self.essays)

    def notes(self, model: LanguageModel, data: Sources, scores: Sequence[Any]) -> list[str]:
        """Return notes on own sources, tasks that do not fit, prompts without the beginning of the answer."""
        notes = []
        if self.essays == "book" or self.squad is None or self.hotpotqa is None or self.words == "own":
            notes.append(
                "Words, essays or questions are longext's own (see data): compare with results on the same, not with "
                "published ones."
            )
        done = {(each.task, each.length) for each in scores}
        for length in sorted(self.lengths):
            left = [name for name in self.wanted if (name, length) not in done]
            if left:
                other = "" if self.error_rate is None else " or the verdicts did not need them"
                notes.append(f"At {length:,} tokens left out, since no sample fits{other}: {', '.join(left)}.")
        if self.answer_prefix and not self.opens(model):
            notes.append("The chat template opens a thought: prompts do not end with the beginning of the answer.")
        return notes


def _told(name: str) -> dict[str, Any]:
    """Return what a record says of a task."""
    return {
        key: value for key, value in asdict(RULER_TASKS[name]).items() if value and key not in ("prompt", "opening")
    }


def _word_lists() -> Any:
    from longext.evals.ruler.sources import WORDS

    return WORDS


def means_by_length(by_task: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per length: the mean of its tasks, whose intervals add up in squares (`mean_interval`)."""
    from longext.evals.statistics import mean_interval

    rows = []
    for length in sorted({row["length"] for row in by_task}):
        same = [row for row in by_task if row["length"] == length]
        low, high = mean_interval([(row["score"], row["low"], row["high"]) for row in same])
        rows.append(
            {
                "task": ALL,
                "length": length,
                "depth": None,
                "num_tasks": len(same),
                "num_trials": sum(row["num_trials"] for row in same),
                "score": sum(row["score"] for row in same) / len(same),
                "low": max(low, 0.0),
                "high": min(high, 1.0),
                "num_tokens": sum(row["num_tokens"] for row in same) / len(same),
            }
        )
    return rows


def effective_length(by_length: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """Return the longest length whose mean reaches 85.6 %, and those whose interval's ends do: low <= it <= high.

    Only lengths with all 13 tasks count, as the threshold is of all of them; 0 if none reaches it, None if no length
    has all.
    """
    whole = [row for row in by_length if row["num_tasks"] == len(RULER_TASKS)]

    def longest(key: str) -> int | None:
        return max((row["length"] for row in whole if row[key] >= REACHED), default=0) if whole else None

    return {"tokens": longest("score"), "tokens_low": longest("low"), "tokens_high": longest("high")}
