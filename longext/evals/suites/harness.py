"""Run tasks of lm-evaluation-harness on any model, extension or memory; offline with files of your own.

Example: longext eval harness MODEL --tasks hellaswag,arc_easy --limit 100

Own tasks: longext eval harness MODEL --tasks mine --include-path tasks/ --memory OUT@8
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.errors import ConfigError, DataError
from longext.evals.base import Outcome, QuestionEval, Work, register
from longext.evals.limits import POSITIVE, PlaceLimit, check_names, read_limits, verdict
from longext.evals.views import Bars, Detail, Score, Section, either
from longext.models.methods import check_method
from longext.options import ChatConfig, RuntimeConfig
from longext.settings import LENGTH, MANY, option, override

if TYPE_CHECKING:
    from longext.evals.harness.tasks import Tasks
    from longext.models.protocol import LanguageModel


def _column(score: Score) -> str:
    named = (score.field("task"), score.field("metric"), score.field("filter"))
    return " ".join(str(name) for name in named if name not in (None, "none"))


_SECTION = Section(
    name="harness",
    title="lm-eval",
    views=(
        Bars(
            "lm-eval tasks",
            of="results.value",
            unit="value",
            columns=_column,
            heading="task",
            scale="metric",
            value="value",
            details=(
                Detail("better", "higher_is_better", either("more", "less")),
                Detail("shots", "num_fewshot"),
                Detail("documents", "num_documents"),
                Detail("cut", "num_truncated"),
            ),
            note="as lm-eval scales them; intervals are of its standard errors, Wilson's if all or none are right; "
            "cut: documents that lost the beginning of a prompt",
        ),
    ),
)


@register("harness")
@dataclass(frozen=True, kw_only=True)
class Harness(QuestionEval):
    """Any task of lm-evaluation-harness; seed and number of resamples are for its own draws."""

    kind: ClassVar[str] = "harness"
    sections: ClassVar[tuple[Section, ...]] = (_SECTION,)

    seed: int = override(RuntimeConfig, "seed", 1234)
    chat_template: bool | None = override(
        ChatConfig, "chat_template", help="Ask through the tokenizer's chat template (default: no, as lm-eval)."
    )
    tasks: tuple[str, ...] = option((), "Tasks or groups of lm-eval, comma-separated.")
    include_path: str | None = option(
        None, "Folder with task files of your own (*.yaml; the Python next to them is run)."
    )
    metadata: tuple[str, ...] = option(
        (),
        "key=value for tasks that make their own data (RULER: max_seq_lengths=[4096,8192], default --max-length or "
        "4096; tokenizer is MODEL's); may be repeated.",
        repeats=True,
    )
    num_fewshot: int | None = option(None, "Examples in a prompt (default: the task's own).", ge=0)
    limit: int | None = option(None, "Only the first documents of each task.", ge=1)
    max_length: int | None = option(
        None, "Tokens read at once; longer inputs lose their beginning (default: the context).", ge=2, le=LENGTH
    )
    system_instruction: str | None = option(None, "System message, or first lines of prompts.")
    fewshot_as_multiturn: bool | None = option(
        None,
        "Examples as turns of a conversation (default with --chat-template), or in one message.",
        "--fewshot-as-multiturn",
        "--fewshot-in-one-turn",
    )
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)
    fail_under: tuple[str, ...] = option(
        (),
        "TASK=SCORE or TASK:METRIC=SCORE, in the metric's own unit: exit with 1 if it is worse; may be repeated.",
        repeats=True,
        panel="Output",
    )

    @property
    def is_chat(self) -> bool:
        """True if tasks are asked through the chat template: only if that is set, as lm-eval."""
        return bool(self.chat_template)

    @property
    def is_multiturn(self) -> bool:
        """True if examples are turns of a conversation, as lm-eval has it by default with a chat template."""
        return self.is_chat if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    def answers_path(self, output: Path) -> Path:
        """Return the folder of answers, one file for each kind of request."""
        return output.with_name(f"{output.name}.predictions")

    def check(self) -> None:
        """Raise ConfigError or DataError for settings that cannot work, before anything is loaded."""
        if not self.tasks:
            raise ConfigError("Missing: tasks. Give lm-eval's names, comma-separated: --tasks hellaswag,arc_easy")
        check_method(self.method, self.factor)
        if self.fewshot_as_multiturn and not self.is_chat:
            raise ConfigError("--fewshot-as-multiturn makes turns of a chat template of examples: add --chat-template.")
        if self.template_arg and not self.is_chat:
            raise ConfigError("--template-arg is for the chat template: add --chat-template.")
        self._least()
        self.task_metadata()
        if self.include_path is not None and not Path(self.include_path).expanduser().is_dir():
            raise DataError(f"--include-path {self.include_path} is no folder. Give one with the task files (*.yaml).")

    def task_metadata(self) -> dict[str, Any]:
        """Return --metadata for tasks that make their own data (RULER): JSON values, anything else as text.

        Raises:
            ConfigError: --metadata that is not key=value.
        """
        found: dict[str, Any] = {}
        for text in self.metadata:
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise ConfigError(f"--metadata takes key=value, for example max_seq_lengths=[4096,8192], got '{text}'.")
            try:
                found[key] = json.loads(value)
            except (ValueError, RecursionError):
                found[key] = value
        return found

    def _least(self) -> dict[str, float]:
        return read_limits(self.fail_under, form="TASK=SCORE or TASK:METRIC=SCORE", scale=POSITIVE)

    def load_data(self) -> Tasks:
        """Return the tasks with their data."""
        from longext.evals.harness.tasks import load_tasks

        return load_tasks(self)

    def limits(self, data: Tasks) -> list[PlaceLimit]:
        """Return the limits of --fail-under (ConfigError: on what the tasks do not measure)."""
        least = self._least()
        check_names(least, data.limit_names())
        return [PlaceLimit(name, name, None, limit) for name, limit in least.items()]

    def verdicts(self, limits: Sequence[PlaceLimit], outcome: Outcome) -> list[dict[str, Any]]:
        """Return what the record says of each limit.

        TASK alone means its first metric; a limit is the most that passes if lm-eval says that less is better.
        """
        verdicts = []
        for limit in limits:
            rows = (r for r in outcome.record["results"] if limit.name in (r["task"], f"{r['task']}:{r['metric']}"))
            row = next(rows, {"value": None, "higher_is_better": True})
            verdicts.append(verdict(limit.name, limit.limit, row["value"], at_most=not row["higher_is_better"]))
        return verdicts

    def measure(self, model: LanguageModel, data: Tasks, work: Work) -> Outcome:
        """Return the record, and what was answered to each document."""
        from longext.evals.harness.run import measure_harness

        return measure_harness(self, model, data, work)
