"""Tasks of lm-evaluation-harness: found, loaded with their data, and kept off the terminal."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longext.checkpoint.load import first_line
from longext.checkpoint.source import resolve_model
from longext.errors import ConfigError, DataError, MissingExtraError
from longext.evals.harness.squad import provide_squad_metrics
from longext.registry import did_you_mean

if TYPE_CHECKING:
    from longext.evals.suites.harness import Harness

_RULER_LENGTHS = tuple(4096 * 2**power for power in range(6))  # that RULER's tasks of lm-eval have a score for
_RANDOM_SEED = 0  # lm-eval's seed of Python's `random`, which some tasks draw their documents with


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: what lm-eval's `load` returns, and the names in --tasks."""

    names: tuple[str, ...]
    loaded: dict[str, Any]

    @property
    def tasks(self) -> dict[str, Any]:
        """lm-eval's task objects by name, those of groups included."""
        tasks: dict[str, Any] = self.loaded["tasks"]
        return tasks

    def num_documents(self, limit: int | None) -> int:
        """Return how many documents are asked."""
        counts = [len(task.eval_docs) for task in self.tasks.values()]
        return sum(count if limit is None else min(limit, count) for count in counts)

    def limit_names(self) -> list[str]:
        """Return what --fail-under can name: tasks and groups, and one of their metrics as TASK:METRIC."""
        named = [(name, list(task.aggregation())) for name, task in self.tasks.items()]
        for name, group in self.loaded["groups"].items():
            if group.aggregate_metric_list:  # others have no number
                named.append((name, [entry.metric for entry in group.aggregate_metric_list]))
        return [*(name for name, _ in named), *(f"{name}:{metric}" for name, metrics in named for metric in metrics)]


def load_tasks(config: Harness) -> Tasks:
    """Return the tasks of --tasks, with their data.

    lm-eval's own 14,000 are only searched (seconds) if the folder of `--include-path` does not have them all.

    Raises:
        ConfigError: unknown task, or one that longext does not run.
        DataError: its data cannot be read, or its file is broken.
        MissingExtraError: it needs a package that is not there.
    """
    if config.include_path is None:
        print("Searching lm-eval's tasks (seconds) ...", file=sys.stderr, flush=True)
    provide_squad_metrics()
    with quiet_harness():
        manager = _find_tasks(config)
        _seed_everything(config.seed)
        tasks = Tasks(config.tasks, _load(manager, config))
    for name, task in tasks.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"{name} runs code that the model writes; longext does not.")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"{name} asks about images or sound; longext's models read text.")
        _set_fewshot(task, config)
    return tasks


def _find_tasks(config: Harness) -> Any:
    """Return lm-eval's manager of tasks, one that knows those of --tasks."""
    from lm_eval.tasks import TaskManager

    folder = str(Path(config.include_path).expanduser()) if config.include_path else None
    model = str(resolve_model(config.model, config.revision))
    longest = {"max_seq_lengths": [config.max_length]} if config.max_length in _RULER_LENGTHS else {}
    metadata: Any = {"tokenizer": model, "pretrained": model, **longest, **config.task_metadata()}
    local: list[str] = []
    if folder:
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        local = manager.all_tasks
        if set(config.tasks) <= set(local):
            return manager
    manager = TaskManager(include_path=folder, metadata=metadata)
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise ConfigError(_unknown_task(name, manager.all_tasks, local, config.include_path))
    return manager


def _unknown_task(name: str, known: Sequence[str], local: Sequence[str], folder: str | None) -> str:
    hint, _, _ = did_you_mean(name, known).rpartition("Available")
    there = ""
    if folder:
        there = f"{folder} has {', '.join(sorted(local)[:10]) or 'no task that lm-eval can read'}. "
        unread = next(Path(folder).expanduser().rglob(f"{name}.yaml"), None)
        if unread is not None:
            there += f"{unread} is there, but is not valid YAML in UTF-8, or names another `task:`. "
    return f"Unknown task '{name}'. {hint}{there}All of lm-eval's: lm-eval ls tasks"


def _load(manager: Any, config: Harness) -> dict[str, Any]:
    names = ",".join(config.tasks)
    try:
        loaded: dict[str, Any] = manager.load(list(config.tasks))
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"The data of {names} cannot be had: {first_line(error)}. Offline, load the task once where there is a "
            "network and copy the Hub's cache (HF_HOME), or give a task file whose data_files are local "
            "(--include-path)."
        ) from error
    except ImportError as error:
        raise MissingExtraError(f"{names} needs a package that is not installed: {first_line(error)}") from error
    except Exception as error:  # anything that a task file can say or run; --debug shows it
        if isinstance(error, StopIteration):
            raise DataError(f"lm-eval cannot load {names}: its data has no rows.") from error
        raise DataError(f"lm-eval cannot load {names}: {root_cause(error)} (--debug shows where)") from error
    return loaded


def root_cause(error: BaseException) -> str:
    """Return the kind and the first words of the error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _set_fewshot(task: Any, config: Harness) -> None:
    """As lm-eval's command does: a task that says 0 keeps 0."""
    number = task.get_config("num_fewshot")
    if number is None or (config.num_fewshot is not None and number != 0):
        task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
    task.set_fewshot_seed(seed=config.seed)


def _seed_everything(seed: int) -> None:
    random.seed(_RANDOM_SEED)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep lm-eval's bars, prints and logs off the terminal, and its bootstrap in this process."""
    import datasets
    from tqdm import tqdm

    with contextlib.ExitStack() as undo:
        logger = logging.getLogger("lm_eval")
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        undo.callback(setattr, tqdm, "__init__", tqdm.__init__)
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if "DISABLE_MULTIPROC" not in os.environ:
            undo.callback(os.environ.pop, "DISABLE_MULTIPROC", None)
            os.environ["DISABLE_MULTIPROC"] = "1"  # its workers are forks, after torch began its threads
        undo.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield
