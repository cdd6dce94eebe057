"""Answer and score LongBench as its authors do: prompts, middle cut, 21 tasks, averages; resumable.

Example: longext eval longbench MODEL --data longbench/ --tasks hotpotqa,qasper -o out

Published answers: longext eval longbench --predictions pred/longalpaca-7b-16k
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.errors import ConfigError
from longext.evals.base import AnswersEval, Outcome, QuestionEval, Work, register
from longext.evals.limits import POINTS, PlaceLimit, check_names, read_limits
from longext.evals.longbench.metrics import CODE_RATIOS, NEED_JIEBA, has_jieba
from longext.evals.longbench.tasks import LANGUAGES, TASKS
from longext.evals.sequential.asking import check_error_rate, error_rate, rounds_path
from longext.evals.views import SEVERAL, Bars, Detail, Score, Section
from longext.models.methods import check_method
from longext.options import RuntimeConfig
from longext.registry import did_you_mean
from longext.settings import LENGTH, option, override

if TYPE_CHECKING:
    from longext.evals.longbench.rows import TaskRun
    from longext.models.protocol import LanguageModel


def _key(place: int) -> Callable[[Score], str]:
    return lambda score: score.keys[place]


def _averages(title: str, of: str, **more: Any) -> Bars:
    return Bars(title, of=of, unit="points", picture=SEVERAL, **more)


def _by_task(title: str, of: str = "results.score", **more: Any) -> Bars:
    return Bars(
        title,
        of=of,
        name="tasks",
        unit="points",
        value="score",
        shade="category",
        details=(
            Detail("category", "category"),
            Detail("metric", "metric"),
            Detail("rows", "num_rows"),
            Detail("empty", "num_empty"),
            Detail("missing", "num_missing"),
            Detail("cut", "num_truncated"),
            Detail("tokens", "num_prompt_tokens", "{:,.0f}"),
        ),
        note="0 to 100; cut: prompts that were too long; tokens: mean length of a prompt as read",
        **{"columns": "task", "heading": "task", **more},
    )


_LONGBENCH = Section(
    name="longbench",
    title="LongBench",
    views=(
        _averages(
            "LongBench averages, as the authors report them",
            "averages.*.*",
            columns=_key(2),
            panel=_key(1),
            panel_name="language",
            lone="code",  # counts in both languages
        ),
        _by_task("LongBench by task"),
    ),
)
_LONGBENCH_E = Section(
    name="longbench-e",
    title="LongBench-E",
    kind="longbench",
    protocol="longbench-e-official",
    picture="longbench",
    views=(
        _averages(
            "LongBench-E averages by words of context",
            "averages.*.english.*",
            columns=_key(3),
            panel=_key(1),
            panel_name="words",
        ),
        _by_task(
            "LongBench-E by task and words of context",
            "results.buckets.*",
            columns=_key(2),
            heading="words",
            panel="task",
        ),
    ),
)
# of results that longext 0.2 wrote with `--backend lm-eval`
_LONGBENCH_LM_EVAL = Section(
    name="longbench-lm-eval",
    title="LongBench under lm-eval's protocol (not the authors')",
    kind="longbench",
    protocol="longbench-lm-eval",
    picture="longbench",
    views=(
        _averages(
            "LongBench averages of lm-eval's groups, not comparable with the authors'", "averages.*.*", columns=_key(2)
        ),
        _by_task("LongBench by task under lm-eval's protocol, not comparable with the authors'"),
    ),
)


@register("longbench")
@dataclass(frozen=True, kw_only=True)
class LongBench(QuestionEval, AnswersEval):
    """LongBench's 21 tasks under their authors' protocol."""

    kind: ClassVar[str] = "longbench"
    sections: ClassVar[tuple[Section, ...]] = (_LONGBENCH, _LONGBENCH_E, _LONGBENCH_LM_EVAL)

    seed: int = override(RuntimeConfig, "seed", is_flag=False)
    tasks: tuple[str, ...] = option((), "Tasks, comma-separated (default: all).")
    backend: str = option("official", "The authors' protocol; lm-eval's own one is `eval harness --tasks longbench`.")
    longbench_e: bool = option(False, "LongBench-E: 13 tasks, scores by length.", "--e")
    data: str = option("hub", "Folder with <task>.jsonl files, or hub.", panel="Data")
    max_length: int | None = option(
        None, "Tokens of a prompt; longer ones lose their middle (default: by the context).", ge=2, le=LENGTH
    )
    limit: int | None = option(None, "Only the first rows of each task.", ge=1)
    code_similarity: str = option(
        "difflib", "difflib, or levenshtein (the authors' score where python-Levenshtein is installed)."
    )
    predictions: str | None = override(
        AnswersEval,
        "predictions",
        help="Score these answers (<task>.jsonl in the authors' schema); MODEL only names them.",
    )
    fail_under: tuple[str, ...] = option(
        (),
        "TASK=SCORE, english=SCORE or chinese=SCORE, 0 to 100: exit with 1 below it; may be repeated.",
        repeats=True,
        panel="Output",
    )
    error_rate: float | None = error_rate()
    resume: bool = option(False, "Only go on with an unfinished run of the same -o; start none.", panel="Output")

    @property
    def wanted(self) -> list[str]:
        """Return the tasks: those of --tasks, else all that can be scored here, LongBench-E's with --e."""
        names = [name for name in TASKS if TASKS[name].is_in_e or not self.longbench_e]
        return list(self.tasks) or [name for name in names if has_jieba() or TASKS[name].metric not in NEED_JIEBA]

    def answers_path(self, output: Path) -> Path | None:
        """Return the folder of answers, one file for each task (and round); None if answers are given."""
        if self.predictions:
            return None
        return rounds_path(output) if self.error_rate is not None else output.with_name(f"{output.name}.predictions")

    def check(self) -> None:
        """Raise ConfigError for an unknown task or value, or for a task named that needs jieba if that is missing."""
        if self.backend == "lm-eval":
            raise ConfigError(
                "--backend lm-eval is gone: for LongBench under lm-eval's own protocol run `longext eval harness "
                "MODEL --tasks longbench_hotpotqa,longbench_qasper` (or --tasks longbench for all)."
            )
        choices = {"--backend": (self.backend, ["official"]), "--code-similarity": (self.code_similarity, CODE_RATIOS)}
        for spelling, (value, names) in choices.items():
            if value not in names:
                raise ConfigError(f"Unknown {spelling} '{value}'. {did_you_mean(value, names)}")
        for name in self.tasks:
            task = TASKS[name]  # ConfigError for an unknown one
            if self.longbench_e and not task.is_in_e:
                known = [other for other in TASKS if TASKS[other].is_in_e]
                raise ConfigError(f"LongBench-E has no task '{name}'. {did_you_mean(name, known)}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"--tasks names a task twice: {', '.join(self.tasks)}.")
        check_method(self.method, self.factor)
        least = self._least()
        if self.longbench_e and (least or self.error_rate is not None):
            given = "--fail-under" if least else "--error-rate"
            raise ConfigError(f"{given} is for LongBench's single scores, and LongBench-E has one for each length.")
        check_error_rate(self)
        unmeasured = [name for name in least if self.tasks and name in TASKS and name not in self.tasks]
        if unmeasured:
            raise ConfigError(f"--fail-under {unmeasured[0]}: the task is not among --tasks {','.join(self.tasks)}.")
        unscorable = [name for name in (*self.tasks, *least) if name in TASKS and TASKS[name].metric in NEED_JIEBA]
        if unscorable and not has_jieba():
            raise ConfigError(
                f"{', '.join(dict.fromkeys(unscorable))} is scored on the words that jieba finds in Chinese text, and "
                "it is not installed: pip install jieba"
            )

    def _least(self) -> dict[str, float]:
        """Return name -> least score of --fail-under; `english` and `chinese` name the averages."""
        least = read_limits(self.fail_under, form="TASK=SCORE", scale=POINTS)
        check_names(least, [*TASKS, *LANGUAGES])
        return least

    def read_data(self) -> tuple[list[TaskRun], list[str]]:
        """Return the tasks with their rows, and notes on what was left out."""
        from longext.evals.longbench.rows import load_tasks

        return load_tasks(self)

    def read_answers(self, path: Path) -> Any:
        """Return the tasks with the answers of a folder, and notes on what was left out."""
        from longext.evals.longbench.rows import read_answers

        return read_answers(self)

    def limits(self, data: tuple[list[TaskRun], list[str]]) -> list[PlaceLimit]:
        """Return the limits of --fail-under.

        Raises:
            ConfigError: one on a task that has no rows here, or on an average that needs such a task.
        """
        from longext.evals.longbench.scores import averages

        names, least = [run.name for run in data[0]], self._least()
        means = averages(dict.fromkeys(names, (0.0, 0.0, 0.0)))
        for name in least:
            if name in TASKS and name not in names:
                raise ConfigError(f"--fail-under {name}: {name} is not scored here. Scored: {', '.join(names)}.")
            if name in means and means[name]["average"] is None:
                raise ConfigError(
                    f"--fail-under {name}: the average needs every task of its table, and some are left out."
                )
        return [PlaceLimit(name, name, None, limit) for name, limit in least.items()]

    def measure(self, model: LanguageModel | None, data: tuple[list[TaskRun], list[str]], work: Work) -> Outcome:
        """Return the record, and the answers in the authors' schema."""
        from longext.evals.longbench.run import measure_longbench

        return measure_longbench(self, model, data, work)
