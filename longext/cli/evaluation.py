"""The command of an evaluation: run it, write its results, print them; the same for all of them."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longext.cli.build import Command
from longext.cli.output import deliver
from longext.cli.processes import scores_path, together
from longext.errors import ConfigError, LongextError
from longext.evals.base import EVALS, Eval
from longext.evals.runner import run_eval
from longext.processes.launcher import is_main_process


def evaluation_command(name: str) -> Command:
    """Return the command of the evaluation `name`; its help is the docstring of its module."""
    kind = EVALS[name]
    text = sys.modules[kind.__module__].__doc__ or kind.__doc__ or ""
    return Command(config=kind, run=run_evaluation, help=inspect.cleandoc(text), extras=("eval",))


def run_evaluation(task: Eval, as_json: bool) -> None:
    """Run an evaluation and write its results; exit with 1 if a limit was missed."""
    from longext.report.console import progress, say_cost, working
    from longext.report.outcome import contents_of
    from longext.report.results import output_directory

    task.check()
    with together(task, output_directory(task.output, task.label, task.subject)) as output:
        answers = task.answers_path(output)
        if not is_main_process():
            run_eval(task, answers=answers)
            return
        with kept_answers([answers, scores_path(output)], output, task):
            measured = run_eval(task, progress=progress, loading=working, answers=answers, tell_cost=say_cost)
            deliver(output, contents_of(measured, str(output)), as_json=as_json, notes=measured.notes)
        task.require(measured.record)


@contextlib.contextmanager
def kept_answers(paths: Sequence[Path | None], output: Path, config: Any) -> Iterator[None]:
    """Remove what is kept at `paths` once the results are written; if the run ends before, say how it goes on."""
    from longext.models.answer_file import holds_answers, remove_answers
    from longext.report.console import say

    kept = [path for path in paths if path is not None]
    for path in kept:
        if (path.exists() or path.is_symlink()) and not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{path}, where the answers are kept, is no file or directory. Choose another -o.")
    if getattr(config, "resume", False) and not any(map(holds_answers, kept)):
        raise ConfigError(f"Nothing to resume: there are no answers in {kept[0]}. Leave --resume out to start the run.")
    try:
        yield
    except LongextError:  # its message says what to do
        raise
    except BaseException:
        for path in kept:
            if not holds_answers(path):
                remove_answers(path)
        if found := [str(path) for path in kept if holds_answers(path)]:
            named = "" if config.output else f" with -o {output}"
            where = " and ".join(found)
            say(f"The answers so far are in {where}: the same command{named} goes on from them.", aside=True)
        raise
    for path in kept:
        remove_answers(path)
