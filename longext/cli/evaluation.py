"""The command of an evaluation: run it, write its results, print them; the same for all of them."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from longext.cli.build import Command
from longext.cli.output import deliver, open_output
from longext.errors import ConfigError, LongextError
from longext.evals.base import EVALS, Eval
from longext.evals.runner import run_eval


def evaluation_command(name: str) -> Command:
    """Return the command of the evaluation `name`; its help is the docstring of its module."""
    kind = EVALS[name]
    text = sys.modules[kind.__module__].__doc__ or kind.__doc__ or ""
    return Command(config=kind, run=run_evaluation, help=inspect.cleandoc(text))


def run_evaluation(task: Eval, as_json: bool) -> None:
    """Run an evaluation and write its results; exit with 1 if a limit was missed."""
    from longext.report.console import progress, say_cost, working
    from longext.report.outcome import contents_of
    from longext.report.results import output_directory

    task.check()
    output = output_directory(task.output, task.label, task.subject)
    open_output(output, task)
    answers = task.answers_path(output)
    with _kept_answers(answers, output, task):
        measured = run_eval(task, progress=progress, loading=working, answers=answers, tell_cost=say_cost)
        deliver(output, contents_of(measured, str(output)), as_json=as_json, notes=measured.notes)
    task.require(measured.record)


@contextlib.contextmanager
def _kept_answers(path: Path | None, output: Path, task: Eval) -> Iterator[None]:
    """Remove the answers at `path` once their results are written; if the run ends before, say how it goes on."""
    from longext.models.answer_file import holds_answers, remove_answers
    from longext.report.console import say

    if path is not None and (path.exists() or path.is_symlink()) and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path}, where the answers are kept, is no file or directory. Choose another -o.")
    if path is not None and getattr(task, "resume", False) and not holds_answers(path):
        raise ConfigError(f"Nothing to resume: there are no answers in {path}. Leave --resume out to start the run.")
    try:
        yield
    except LongextError:  # its message says what to do
        raise
    except BaseException:
        if path is None:
            raise
        if holds_answers(path):
            named = "" if task.output else f" with -o {output}"
            say(f"The answers so far are in {path}: the same command{named} goes on from them.", aside=True)
        else:
            remove_answers(path)
        raise
    if path is not None:
        remove_answers(path)
