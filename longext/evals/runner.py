"""The one way an evaluation is run: checked, its data read, its model opened, measured, judged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.errors import ConfigError
from longext.evals.base import Eval, Progress, Work, no_progress
from longext.options import ChatConfig

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel
    from longext.models.throughput.cost import Cost


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An evaluation that was run.

    Attributes:
        task: its settings.
        record: the JSON record, verdicts on its limits included.
        notes: what a reader of the numbers has to know.
        files: further files of the results by name.
    """

    task: Eval
    record: dict[str, Any]
    notes: Sequence[str] = ()
    files: Mapping[str, str | Callable[[], str]] = field(default_factory=dict)


def run_eval(
    task: Eval,
    model: LanguageModel | None = None,
    *,
    data: Any = None,
    progress: Progress = no_progress,
    loading: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    answers: Path | None = None,
    tell_cost: Callable[[Cost], object] = lambda cost: None,
) -> Measured:
    """Return what `task` measures of its model.

    Args:
        model: already open, instead of the one that `task` names.
        data: already read, instead of what `task` names.
        progress: opens a progress display.
        loading: opens what shows that a model is being loaded.
        answers: where answers are kept while the run lasts.
        tell_cost: told what a part of the run will cost, before it begins.

    Raises:
        ConfigError, DataError, CheckpointError: something given cannot be used.
    """
    from longext.models.chat import check_asking, set_asking

    task.check()
    asking = task if isinstance(task, ChatConfig) else None
    if asking:
        check_asking(asking)
    data = task.load_data() if data is None else data
    limits = task.limits(data)
    if model is None:
        from longext.threads import set_threads

        set_threads(task.threads)
        with loading(f"loading {task.model}"):
            model = task.open_model()
    readable = getattr(model, "kinds", None)
    if readable is not None and task.kind not in readable:
        raise ConfigError(f"{task.model} is a .gguf, which `eval ppl` and `passkey` read. Give a checkpoint.")
    if asking and model is not None:
        set_asking(model, asking)
    from longext.models.throughput.cost import Bill

    bill = Bill(tell_cost, task.price_per_hour)
    work = Work(progress=progress, answers=answers, expect=bill.expect, expect_at_most=bill.expect_at_most)
    outcome = task.measure(model, data, work)
    outcome.record.update(bill.facts())
    if task.limit_option:
        outcome.record["bars"] = task.verdicts(limits, outcome)
    return Measured(task=task, record=outcome.record, notes=outcome.notes, files=outcome.files)
