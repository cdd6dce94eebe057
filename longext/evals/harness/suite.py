"""Any task of lm-evaluation-harness, on everything that is a `LanguageModel`.

The harness brings tasks: prompts, few-shot examples, filters, metrics. Scores and answers come from longext, so that
extended models, compressors and cache policies are measured as plain ones are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint.load import first_line
from longext.checkpoint.source import resolve_model
from longext.errors import ConfigError, DataError, LongextError, MissingExtraError
from longext.evals.config import HarnessConfig
from longext.evals.harness.model import Progress, Scorer, harness_model
from longext.evals.limits import POSITIVE, check_names, read_limits, verdict
from longext.evals.statistics import stderr_interval
from longext.manifest import result_record
from longext.models.answers import answer_notes
from longext.models.chat import asked_facts, uses_template
from longext.models.methods import check_method
from longext.models.protocol import LanguageModel
from longext.registry import did_you_mean

_RANDOM_SEED = 0  # lm-eval's seed of Python's `random`, which some tasks draw their documents with
# what a task file can get wrong: its templates and functions run inside lm-eval
_TASK_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: what lm-eval's `load` returns, and the names that were asked for."""

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


@dataclass(frozen=True)
class Score:
    """One number of a task or group, as lm-eval reports it; `num_fewshot` and `num_documents` are None for groups.

    `low` and `high` are the 95 % interval of lm-eval's standard error, Wilson's where all or none are right.
    """

    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool
    num_fewshot: int | None
    num_documents: int | None
    num_truncated: int
    low: float | None = None
    high: float | None = None


# --- tasks ------------------------------------------------------------------------------------------------------------


def check_harness_config(config: HarnessConfig) -> None:
    """Raise ConfigError or DataError for settings that cannot work, before anything is loaded."""
    if not config.tasks:
        raise ConfigError("Missing: tasks. Give lm-eval's names, comma-separated: --tasks hellaswag,arc_easy")
    check_method(config.method, config.factor)
    if config.fewshot_as_multiturn and not config.chat_template:
        raise ConfigError("--fewshot-as-multiturn puts examples into turns of a chat template: add --chat-template.")
    _check_template_arg(config)
    _bars(config)
    harness_metadata(config)
    if config.include_path is not None and not Path(config.include_path).expanduser().is_dir():
        raise DataError(f"--include-path {config.include_path} is no folder. Give one with the task files (*.yaml).")


def _check_template_arg(config: HarnessConfig) -> None:
    if config.template_arg and not config.chat_template:
        raise ConfigError("--template-arg is for the chat template: add --chat-template.")


def harness_metadata(config: HarnessConfig) -> dict[str, Any]:
    """Return what --metadata tells tasks that make their own data (RULER): JSON values, anything else as text.

    Raises:
        ConfigError: --metadata that is not key=value.
    """
    found: dict[str, Any] = {}
    for text in config.metadata:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--metadata takes key=value, for example max_seq_lengths=[4096,8192], got '{text}'.")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


def _bars(config: HarnessConfig) -> dict[str, float]:
    return read_limits(config.fail_under, form="TASK=SCORE or TASK:METRIC=SCORE", scale=POSITIVE)


def load_harness_tasks(config: HarnessConfig) -> Tasks:
    """Return the tasks asked for, with their data.

    lm-eval's own 14,000 are only searched (seconds) where the folder of `--include-path` does not have them all.

    Raises:
        ConfigError: unknown task, one that longext does not run, or a wrong --fail-under.
        DataError: its data cannot be read, or its file is broken.
        MissingExtraError: it needs a package that is not there.
    """
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        own = str(Path(config.include_path).expanduser()) if config.include_path else None
        metadata: Any = {"tokenizer": str(resolve_model(config.model, config.revision)), **harness_metadata(config)}
        manager = TaskManager(include_path=own, include_defaults=False, metadata=metadata) if own else None
        if manager is None or not set(config.tasks) <= set(manager.all_tasks):
            local = manager.all_tasks if manager else []
            manager = TaskManager(include_path=own, metadata=metadata)
            for name in config.tasks:
                if name not in manager.all_tasks:
                    raise ConfigError(_unknown_task(name, manager.all_tasks, local, config.include_path))
    tasks = prepare_tasks(manager, config.tasks, config)
    check_names(_bars(config), _barred_names(tasks))
    return tasks


def prepare_tasks(manager: Any, specs: Sequence[Any], config: HarnessConfig) -> Tasks:
    """Return the tasks that lm-eval's `manager` loads for `specs` (names or configs), ready to be run.

    Raises:
        ConfigError: one that longext does not run.
        DataError, MissingExtraError: as `load_harness_tasks`.
    """
    with quiet_harness():
        _seed_everything(config.seed)
        tasks = Tasks(config.tasks, _load(manager, specs, config))
    for name, task in tasks.tasks.items():
        _check_task(name, task)
        _set_fewshot(task, config)
    return tasks


def _load(manager: Any, specs: Sequence[Any], config: HarnessConfig) -> dict[str, Any]:
    names = ",".join(config.tasks)
    try:
        loaded: dict[str, Any] = manager.load(list(specs))
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
        raise DataError(f"lm-eval cannot load {names}: {_told(error)} (--debug shows where)") from error
    return loaded


def _told(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _unknown_task(name: str, known: Sequence[str], local: Sequence[str], folder: str | None) -> str:
    hint, _, _ = did_you_mean(name, known).rpartition("Available")
    shown = ", ".join(sorted(local)[:10]) or "no task that lm-eval can read"
    own = f"{folder} has {shown}. " if folder else ""
    unread = next(Path(folder).expanduser().rglob(f"{name}.yaml"), None) if folder else None
    if unread is not None:
        own += f"{unread} is there, but is not valid YAML in UTF-8, or names another `task:`. "
    return f"Unknown task '{name}'. {hint}{own}All of lm-eval's: lm-eval ls tasks"


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"{name} runs code that the model writes; longext does not.")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"{name} asks about images or sound; longext's models read text.")


def _set_fewshot(task: Any, config: HarnessConfig) -> None:
    """As lm-eval's command does: a task that says 0 keeps 0."""
    own = task.get_config("num_fewshot")
    if own is None or (config.num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
    task.set_fewshot_seed(seed=config.seed)


def _barred_names(tasks: Tasks) -> list[str]:
    """What --fail-under can name: tasks and groups, and one of their metrics as TASK:METRIC."""
    named = [(name, list(task.aggregation())) for name, task in tasks.tasks.items()]
    for name, group in tasks.loaded["groups"].items():
        if group.aggregate_metric_list:  # others have no number of their own
            named.append((name, [entry.metric for entry in group.aggregate_metric_list]))
    return [*(name for name, _ in named), *(f"{name}:{metric}" for name, metrics in named for metric in metrics)]


def _seed_everything(seed: int) -> None:
    import numpy

    random.seed(_RANDOM_SEED)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep lm-eval's bars, prints and logs off the terminal, and its bootstrap in this process."""
    import datasets
    from tqdm import tqdm

    logger, level, construct = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level, tqdm.__init__
    had_bars, processes = datasets.are_progress_bars_disabled(), os.environ.get("DISABLE_MULTIPROC")
    try:
        logger.setLevel(logging.CRITICAL)
        tqdm.__init__ = functools.partialmethod(construct, disable=True)
        datasets.disable_progress_bars()
        os.environ["DISABLE_MULTIPROC"] = "1"  # forks after torch began its threads
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = construct
        if not had_bars:
            datasets.enable_progress_bars()
        if processes is None:
            os.environ.pop("DISABLE_MULTIPROC", None)


# --- a run ------------------------------------------------------------------------------------------------------------


def partial_folder(output: Path) -> Path:
    """Return where the answers of a run lie until its results are written."""
    return output.with_name(f"{output.name}.predictions")


def open_scorer(
    model: LanguageModel, config: HarnessConfig, on_progress: Progress | None = None, folder: Path | None = None
) -> Scorer:
    """Return the scorer of a run: a memory reads any length unless --max-length says otherwise.

    Args:
        folder: where answers are kept, for a run that is cut off.

    Raises:
        ConfigError: --chat-template, and the tokenizer has none.
    """
    _check_template_arg(config)
    uses_template(model, config.chat_template)
    window = config.max_length or (None if config.memory else model.context_length)
    return Scorer(
        model,
        window,
        config.batch_tokens,
        on_progress,
        folder,
        config.system_instruction is not None,
        bool(config.chat_template),
    )


def as_multiturn(config: HarnessConfig) -> bool:
    """Return True where examples are turns of a conversation, as lm-eval has it by default with a chat template."""
    return bool(config.chat_template) if config.fewshot_as_multiturn is None else config.fewshot_as_multiturn


def run_harness(scorer: Scorer, tasks: Tasks, config: HarnessConfig) -> dict[str, Any]:
    """Return what lm-eval's `evaluate` returns.

    Raises:
        ConfigError: the chat template refuses the messages.
        DataError: a prompt, filter or metric of a task fails.
    """
    from jinja2 import TemplateError
    from lm_eval import evaluate

    try:
        with quiet_harness():
            results: dict[str, Any] = evaluate(
                harness_model(scorer),
                tasks.loaded,
                limit=config.limit,
                bootstrap_iters=config.num_bootstrap,
                system_instruction=config.system_instruction,
                apply_chat_template=bool(config.chat_template),
                fewshot_as_multiturn=as_multiturn(config),
            )
    except ImportError as error:
        raise MissingExtraError(f"A task needs a package that is not installed: {first_line(error)}") from error
    except (TemplateError, *_TASK_ERRORS) as error:
        raise DataError(f"lm-eval cannot run {','.join(tasks.names)}: {_told(error)} (--debug shows where)") from error
    return results


def harness_scores(results: dict[str, Any], scorer: Scorer) -> list[Score]:
    """Return every number of every task and group, in lm-eval's order."""
    cut = Counter(task for task, _ in scorer.truncated)
    subtasks = results.get("group_subtasks", {})
    scores = []
    for name, values in results["results"].items():
        inside = subtasks.get(name) or [name]
        for key, value in values.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            number, error = _number(value), _number(values.get(f"{metric}_stderr,{filter}"))
            between = None if number is None else stderr_interval(number, error, _num_asked(results, inside))
            scores.append(
                Score(
                    name,
                    metric,
                    filter,
                    number,
                    error,
                    results["higher_is_better"].get(name, {}).get(metric) is not False,
                    results["n-shot"].get(name),
                    results["n-samples"].get(name, {}).get("effective"),
                    sum(cut[task] for task in inside),
                    *(between or (None, None)),
                )
            )
    if not scores:
        raise LongextError("lm-eval returned no number for any task.")
    return scores


def _num_asked(results: dict[str, Any], tasks: Sequence[str]) -> int:
    return sum(results["n-samples"].get(task, {}).get("effective") or 0 for task in tasks)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def harness_notes(scorer: Scorer, scores: Sequence[Score], config: HarnessConfig) -> list[str]:
    """Return what a reader of the scores has to know."""
    notes = []
    if scorer.truncated:
        notes.append(
            f"Documents whose input was longer than {scorer.window} tokens and lost its beginning: "
            f"{len(scorer.truncated)} (as lm-eval cuts: instructions and BOS go first)."
        )
    if scorer.spelled:
        notes.append(
            "Texts of tasks spell control tokens, which the model reads as such: --neutralise-control-tokens makes "
            "text of them."
        )
    notes += answer_notes(scorer.predictions) if scorer.predictions else []
    if scorer.without_system:
        notes.append(
            "The chat template refuses system messages: the descriptions of tasks were left out (as lm-eval does)."
        )
    if scorer.ignored:
        notes.append(f"Settings of tasks without effect here: {', '.join(sorted(scorer.ignored))}; answers are greedy.")
    if config.limit is not None:
        notes.append(f"--limit {config.limit}: not comparable with published scores.")
    if config.num_fewshot is not None:
        kept = sorted({s.task for s in scores if s.num_fewshot not in (None, config.num_fewshot)})
        notes += [f"Tasks that fix their number of examples at 0 keep it: {', '.join(kept)}."] if kept else []
    return notes


def harness_verdicts(scores: Sequence[Score], config: HarnessConfig) -> list[dict[str, Any]]:
    """Return the bars of --fail-under with what was measured.

    TASK alone means its first metric; a bar is the most that passes where lm-eval says that less is better.
    """
    rows = []
    for name, limit in _bars(config).items():
        score = next((s for s in scores if name in (s.task, f"{s.task}:{s.metric}")), None)
        less_is_better = score is not None and not score.higher_is_better
        rows.append(verdict(name, limit, score.value if score else None, at_most=less_is_better))
    return rows


def sample_lines(results: dict[str, Any]) -> str:
    """Return one JSON line per document and filter: answer, target and the values of its metrics."""
    lines = []
    for task, samples in results["samples"].items():
        for sample in samples:
            kept = {key: sample[key] for key in ("doc_id", "filter", "target", "filtered_resps", "prompt_hash")}
            values = {metric: sample[metric] for metric in sample["metrics"]}
            lines.append(json.dumps({"task": task, **kept, **values}, ensure_ascii=False, default=str) + "\n")
    return "".join(lines)


def harness_record(
    scorer: Scorer,
    results: dict[str, Any],
    scores: Sequence[Score],
    config: HarnessConfig,
    notes: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Return the JSON record, with every task's own config and version."""
    version = importlib.metadata.version("lm-eval")
    protocol = {
        "id": "lm-eval",
        "definition": "lm-eval's tasks, filters and metrics; log-probabilities and greedy answers from longext",
        "reference": f"lm-evaluation-harness {version}",
        "lm_eval": version,
        "max_length": scorer.window,
        "truncation": "the beginning goes" if scorer.window else "none",
        "num_fewshot": config.num_fewshot,
        "chat_template": bool(config.chat_template),
        "system_instruction": config.system_instruction,
        "fewshot_as_multiturn": as_multiturn(config),
        "limit": config.limit,
        "seed": config.seed,
        "num_bootstrap": config.num_bootstrap,
        "metadata": harness_metadata(config),
        **asked_facts(scorer.model, bool(config.chat_template), scorer.prompt_hashes),
    }
    tasks = {
        name: {
            "version": results["versions"].get(name),
            "config": json.loads(json.dumps(task_config, default=str)),
            "sha256": _hash_of(results["samples"].get(name, [])),
        }
        for name, task_config in results["configs"].items()
    }
    return result_record(
        "harness",
        scorer.model.describe(),
        protocol,
        {"source": config.include_path or "lm-eval", "tasks": tasks},
        seconds=seconds,
        results=[dataclasses.asdict(score) for score in scores],
        notes=list(notes),
    )


def _hash_of(samples: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()
