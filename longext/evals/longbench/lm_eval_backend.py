"""LongBench through lm-eval's own task definitions: another protocol, whose scores say nothing beside the authors'.

The rows are those that the authors' protocol reads; prompts, cuts, ends of answers and metrics are lm-eval's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from longext.errors import ConfigError, MissingExtraError
from longext.evals.config import HarnessConfig, LongBenchConfig
from longext.evals.harness.model import Scorer
from longext.evals.harness.suite import Score, Tasks, as_multiturn, harness_scores, prepare_tasks
from longext.evals.longbench.rows import LongBenchRow
from longext.evals.longbench.run import TaskRun, data_facts
from longext.evals.longbench.suite import LANGUAGES, TaskScore
from longext.evals.longbench.tasks import CATEGORIES, TASKS, prompt_hash
from longext.manifest import result_record
from longext.models.chat import asked_facts

PROTOCOL = "longbench-lm-eval"
OFFICIAL = "longbench-official"
DIFFERENCES = (
    "long prompts lose their beginning, instruction and BOS with it (authors: their middle)",
    "triviaqa and samsum have one line feed before the question (authors: two); passage_count, passage_retrieval_en, "
    "lcc and repobench-p lack the white space behind their last word",
    "trec, triviaqa, samsum and lsht end at the first line feed, even one that an answer begins with",
    "a chat template, where asked for, goes around few-shot and code prompts too",
    "answers, but code, are stripped before they are scored; code similarity passes over blank lines",
    "averages are of unrounded scores, English and Chinese tasks together",
)
_PREFIX = "longbench_"  # lm-eval's names of the tasks
_SCORE = "score"  # the metric that all of them have
_PACKAGES = ("jieba", "fuzzywuzzy", "rouge")
_NOT_HERE = {  # options of the authors' protocol that lm-eval's tasks have no place for
    "longbench_e": "--e",
    "predictions": "--predictions",
    "resume": "--resume",
    "code_similarity": "--code-similarity",
}


def check_lm_eval_config(config: LongBenchConfig) -> None:
    """Raise ConfigError for an option that lm-eval's tasks do not have, MissingExtraError without its metrics."""
    defaults = {field.name: field.default for field in fields(LongBenchConfig)}
    for name, option in _NOT_HERE.items():
        if getattr(config, name) != defaults[name]:
            more = " (a run that was cut off goes on by itself)" if name == "resume" else ""
            raise ConfigError(f"{option} is of --backend official alone{more}: leave it out, or --backend lm-eval.")
    averages = tuple(f"{language.lower()}=" for language in LANGUAGES.values())
    for bar in config.fail_under:
        if bar.startswith(averages):
            raise ConfigError(f"--fail-under {bar}: averages by language are of --backend official alone; name a task.")
    missing = missing_packages()
    if missing:
        raise MissingExtraError(
            f"--backend lm-eval scores with lm-eval's own metrics, which need {', '.join(_PACKAGES)} (not installed: "
            f"{', '.join(missing)}): pip install 'longext[longbench-lm-eval]'"
        )


def missing_packages() -> list[str]:
    """Return which packages of lm-eval's metrics are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def harness_settings(config: LongBenchConfig, names: Sequence[str]) -> HarnessConfig:
    """Return the settings of the harness for the tasks `names`, whose rows are limited already."""
    shared = {field.name for field in fields(HarnessConfig)} & {field.name for field in fields(LongBenchConfig)}
    values = {name: getattr(config, name) for name in shared - {"tasks", "limit", "seed", "fail_under"}}
    return HarnessConfig(**values, tasks=tuple(f"{_PREFIX}{name}" for name in names))


def load_lm_eval_tasks(runs: Sequence[TaskRun], settings: HarnessConfig) -> Tasks:
    """Return lm-eval's definitions of the tasks of `runs`, each with the rows of its run in place of the Hub's.

    Raises:
        LongextError: lm-eval cannot load them.
    """
    import jieba  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval import tasks as package

    jieba.setLogLevel(logging.WARNING)
    folder = Path(str(package.__file__)).parent / "longbench"
    manager = package.TaskManager(include_path=str(folder), include_defaults=False)
    # a member of a group is a task of the folder with some of its keys replaced
    members = [{"task": f"{_PREFIX}{run.name}", "custom_dataset": _dataset_of(run.rows)} for run in runs]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
        tasks = prepare_tasks(manager, [{"group": PROTOCOL, "task": members}], settings)
    return Tasks(settings.tasks, {"tasks": tasks.tasks, "groups": {}, "group_map": {}})


def _dataset_of(rows: Sequence[LongBenchRow]) -> Callable[..., Any]:
    """Return what lm-eval calls for the data of a task: the rows with the names of its Hub copy."""

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        columns = [
            {
                "question": row.question,
                "context": row.context,
                "answers": list(row.answers),
                "length": row.length,
                "all_classes": list(row.all_classes),
                "_id": row.id,
            }
            for row in rows
        ]
        return {"test": Dataset.from_list(columns)}

    return dataset


# --- scores -----------------------------------------------------------------------------------------------------------


def lm_eval_scores(results: dict[str, Any], scorer: Scorer, runs: Sequence[TaskRun]) -> list[TaskScore]:
    """Return the score of every task, 100 times lm-eval's."""
    values = _values(results, scorer)
    return [
        TaskScore(
            task=run.name,
            score=_points(values[run.name].value),
            buckets=None,
            num_rows=len(run.rows),
            num_missing=0,
            num_empty=sum(not sample["filtered_resps"][0].strip() for sample in _samples(results, run)),
            num_truncated=values[run.name].num_truncated,
            num_prompt_tokens=_mean([n for (task, _), n in scorer.prompt_tokens.items() if task == _PREFIX + run.name]),
        )
        for run in runs
    ]


def _points(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _values(results: dict[str, Any], scorer: Scorer) -> dict[str, Score]:
    found = harness_scores(results, scorer)
    return {score.task.removeprefix(_PREFIX): score for score in found if score.metric == _SCORE}


def _samples(results: dict[str, Any], run: TaskRun) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = results["samples"][f"{_PREFIX}{run.name}"]
    return samples


def lm_eval_averages(scores: Sequence[TaskScore]) -> dict[str, dict[str, float | None]]:
    """Return lm-eval's groups: the mean of a category's tasks in all languages, and that of the six categories.

    None where a task of the category, or a category, was not scored.
    """
    known = {score.task: score.score for score in scores}
    means: dict[str, float | None] = {}
    for category in CATEGORIES:
        own = [known.get(name) for name in TASKS if TASKS[name].category == category]
        means[category] = _mean(own)
    return {"all": {**means, "average": _mean(list(means.values()))}}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def lm_eval_note() -> str:
    """Return what has to stand beside every score."""
    return f"lm-eval's protocol, not comparable with the authors' ({OFFICIAL}): {'; '.join(DIFFERENCES)}."


def lm_eval_record(
    scorer: Scorer,
    results: dict[str, Any],
    runs: Sequence[TaskRun],
    scores: Sequence[TaskScore],
    config: LongBenchConfig,
    notes: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Return the JSON record; rows have the metric as lm-eval names it, and its standard error."""
    version = importlib.metadata.version("lm-eval")
    settings = harness_settings(config, [run.name for run in runs])
    protocol = {
        "id": PROTOCOL,
        "definition": "LongBench's rows through lm-eval's task definitions: its prompts, cuts and metrics; greedy "
        "answers from longext; 100 times lm-eval's scores",
        "reference": f"lm-evaluation-harness {version}, tasks/longbench",
        "not_comparable_with": OFFICIAL,
        "differences": list(DIFFERENCES),
        "lm_eval": version,
        "max_length": scorer.window,
        "truncation": "the beginning goes" if scorer.window else "none",
        "chat_template": bool(config.chat_template),
        "fewshot_as_multiturn": as_multiturn(settings),
        "limit": config.limit,
        **asked_facts(scorer.model, bool(config.chat_template), scorer.prompt_hashes),
        "prompts": {run.name: prompt_hash(results["configs"][f"{_PREFIX}{run.name}"]["doc_to_text"]) for run in runs},
        "tasks": {run.name: {"version": results["versions"][f"{_PREFIX}{run.name}"]} for run in runs},
    }
    return result_record(
        "longbench",
        scorer.model.describe(),
        protocol,
        data_facts(config, runs),
        seconds=seconds,
        results=[_entry(score, results, scorer) for score in scores],
        averages=lm_eval_averages(scores),
        notes=list(notes),
    )


def _entry(score: TaskScore, results: dict[str, Any], scorer: Scorer) -> dict[str, Any]:
    task, found = TASKS[score.task], _values(results, scorer)[score.task]
    metrics = [s.metric for s in harness_scores(results, scorer) if s.task == f"{_PREFIX}{score.task}"]
    return {
        "task": score.task,
        "score": score.score,
        "stderr": _points(found.stderr),
        "low": _points(found.low),
        "high": _points(found.high),
        **{key: getattr(score, key) for key in ("buckets", "num_rows", "num_missing", "num_empty")},
        **{key: getattr(score, key) for key in ("num_truncated", "num_prompt_tokens")},
        "category": task.category,
        "language": task.language,
        "metric": next((name for name in metrics if name != _SCORE), _SCORE),
    }
