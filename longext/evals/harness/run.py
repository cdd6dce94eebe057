"""Any task of lm-evaluation-harness, on everything that is a `LanguageModel`.

The harness brings tasks: prompts, few-shot examples, filters, metrics. Scores and answers come from longext, so that
extended models, compressors and cache policies are measured as plain ones are.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longext.checkpoint.load import first_line
from longext.errors import DataError, LongextError, MissingExtraError
from longext.evals.base import Outcome, Work
from longext.evals.harness.model import Scorer, harness_model
from longext.evals.harness.tasks import Tasks, quiet_harness, root_cause
from longext.evals.statistics import stderr_interval
from longext.manifest import result_record
from longext.models.answers import answer_notes
from longext.models.chat import asked_facts, uses_template
from longext.models.protocol import LanguageModel

if TYPE_CHECKING:
    from longext.evals.suites.harness import Harness

# what a task file can get wrong: its templates and functions run inside lm-eval
_TASK_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, NotImplementedError)


def measure_harness(config: Harness, model: LanguageModel, tasks: Tasks, work: Work) -> Outcome:
    """Return the record of `eval harness`, with every document's answer as samples.jsonl.

    Raises:
        ConfigError: --chat-template, and the tokenizer has none, or it refuses the messages.
        DataError: a prompt, filter or metric of a task fails.
    """
    started = time.perf_counter()
    uses_template(model, config.chat_template)
    scorer = Scorer(
        model,
        # a memory reads any length
        window=config.max_length or (None if config.memory else model.context_length),
        batch_tokens=config.batch_tokens,
        folder=work.answers,
        expect=work.expect,
        needs_system=config.system_instruction is not None,
        is_chat=config.is_chat,
    )
    with work.progress("lm-eval", tasks.num_documents(config.limit), "documents") as scorer.on_progress:
        results = _evaluate(scorer, tasks, config)
    scores = _scores(results, scorer)
    notes = _notes(scorer, scores, config)
    record = _record(scorer, results, scores, config, notes, time.perf_counter() - started)
    return Outcome(record=record, notes=notes, files={"samples.jsonl": _sample_lines(results)})


def _evaluate(scorer: Scorer, tasks: Tasks, config: Harness) -> dict[str, Any]:
    """Return what lm-eval's `evaluate` returns."""
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
                apply_chat_template=config.is_chat,
                fewshot_as_multiturn=config.is_multiturn,
            )
    except ImportError as error:
        raise MissingExtraError(f"A task needs a package that is not installed: {first_line(error)}") from error
    except (TemplateError, *_TASK_ERRORS) as error:
        message = f"lm-eval cannot run {','.join(tasks.names)}: {root_cause(error)} (--debug shows where)"
        raise DataError(message) from error
    return results


def _scores(results: dict[str, Any], scorer: Scorer) -> list[dict[str, Any]]:
    """Return a row for every number of every task and group, in lm-eval's order.

    `num_fewshot` and `num_documents` are None for groups; `low` and `high` are the 95 % interval of lm-eval's standard
    error, Wilson's if all or none are right.
    """
    cut = Counter(task for task, _ in scorer.truncated)
    samples = results["n-samples"]
    rows = []
    for name, values in results["results"].items():
        inside = results.get("group_subtasks", {}).get(name) or [name]
        count = sum(samples.get(task, {}).get("effective") or 0 for task in inside)
        for key, value in values.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            number, error = _number(value), _number(values.get(f"{metric}_stderr,{filter}"))
            low, high = (None if number is None else stderr_interval(number, error, count)) or (None, None)
            row = {
                "task": name,
                "metric": metric,
                "filter": filter,
                "value": number,
                "stderr": error,
                "higher_is_better": results["higher_is_better"].get(name, {}).get(metric) is not False,
                "num_fewshot": results["n-shot"].get(name),
                "num_documents": samples.get(name, {}).get("effective"),
                "num_truncated": sum(cut[task] for task in inside),
                "low": low,
                "high": high,
            }
            rows.append(row)
    if not rows:
        raise LongextError("lm-eval returned no number for any task.")
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _notes(scorer: Scorer, scores: Sequence[dict[str, Any]], config: Harness) -> list[str]:
    """Return what a reader of the scores has to know."""
    notes = []
    if scorer.truncated:
        notes.append(
            f"Documents whose input was longer than {scorer.window} tokens and lost its beginning: "
            f"{len(scorer.truncated)} (as lm-eval cuts: instructions and BOS go first)."
        )
    if scorer.spells_control:
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
        kept = sorted({row["task"] for row in scores if row["num_fewshot"] not in (None, config.num_fewshot)})
        notes += [f"Tasks that fix their number of examples at 0 keep it: {', '.join(kept)}."] if kept else []
    return notes


def _sample_lines(results: dict[str, Any]) -> str:
    """Return one JSON line per document and filter: answer, target and the values of its metrics."""
    lines = []
    for task, samples in results["samples"].items():
        for sample in samples:
            kept = {key: sample[key] for key in ("doc_id", "filter", "target", "filtered_resps", "prompt_hash")}
            values = {metric: sample[metric] for metric in sample["metrics"]}
            lines.append(json.dumps({"task": task, **kept, **values}, ensure_ascii=False, default=str) + "\n")
    return "".join(lines)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return a task's config without `pretrained`, which `_find_tasks` tells tasks that make their own data."""
    told = {"pretrained"}
    metadata = {key: value for key, value in config.get("metadata", {}).items() if key not in told}
    return {**config, "metadata": metadata} if "metadata" in config else config


def _record(
    scorer: Scorer,
    results: dict[str, Any],
    scores: Sequence[dict[str, Any]],
    config: Harness,
    notes: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    version = importlib.metadata.version("lm-eval")
    protocol = {
        "id": "lm-eval",
        "definition": "lm-eval's tasks, filters and metrics; log-probabilities and greedy answers from longext",
        "reference": f"lm-evaluation-harness {version}",
        "lm_eval": version,
        "max_length": scorer.window,
        "truncation": "the beginning goes" if scorer.window else "none",
        "num_fewshot": config.num_fewshot,
        "chat_template": config.is_chat,
        "system_instruction": config.system_instruction,
        "fewshot_as_multiturn": config.is_multiturn,
        "limit": config.limit,
        "seed": config.seed,
        "num_bootstrap": config.num_bootstrap,
        "metadata": config.task_metadata(),
        **asked_facts(scorer.model, config.is_chat, scorer.prompt_hashes),
    }
    tasks = {
        name: {
            "version": results["versions"].get(name),
            "config": _without_paths(json.loads(json.dumps(task_config, default=str))),
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
        results=scores,
        notes=list(notes),
    )


def _hash_of(samples: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()
