"""`longext compare`: every method through the same evaluations, then a report on their results."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import read_config, resolve_model
from longext.conversion.extend import ExtensionPlan
from longext.errors import ConfigError, DataError, LongextError
from longext.evals.base import Eval, Progress
from longext.evals.limits import check_lengths
from longext.evals.runner import Measured, run_eval
from longext.evals.suites.passkey import Passkey
from longext.evals.suites.ppl import Perplexity
from longext.manifest import result_record
from longext.models.methods import RemapRequest, apply_method, described, plan_method
from longext.processes.launcher import num_processes
from longext.report.outcome import Comparison, Result
from longext.report.page import report_files
from longext.report.results import Contents, Written, write_result_files
from longext.settings import shared_settings
from longext.staging import staged_directory

if TYPE_CHECKING:
    from longext.models.hf import HFLanguageModel
    from longext.report.config import CompareConfig

_OF_TASKS = frozenset({"lengths", "protocol", "method", "factor", "output", "force"})
_PERPLEXITY = ("id", "stride", "definition", "weighting", "bos")
_PASSKEY = ("id", "definition", "scoring", "filler", "num_needles", "num_digits", "prompts_sha256")


def plan_methods(config: CompareConfig) -> dict[str, ExtensionPlan | RemapRequest | None]:
    """Return the plan of every method, by the name the user gave it; None for the model as it is.

    Raises:
        ConfigError: unknown, repeated or impossible method.
    """
    if not config.methods:
        raise ConfigError("--methods needs at least one method, for example none,linear,yarn.")
    if len(set(config.methods)) != len(config.methods):
        raise ConfigError(f"--methods names one method twice: {','.join(config.methods)}.")
    return {name: plan_method(name, config.model, config.revision, config.factor) for name in config.methods}


def compare_methods(
    config: CompareConfig, progress: Progress, announce: Callable[[str], None] = lambda line: None
) -> Comparison:
    """Run `eval ppl` (sliding, positional) and `passkey` with every method of `config.methods` on one loaded model.

    A method that fails is left out: the record has it with the reason under "failed". Of several processes the others
    would wait for it, so there it ends the run.

    Args:
        progress: (what, total, unit) -> context manager that yields advance(n).
        announce: called with one line when a method is done.

    Raises:
        ConfigError, CheckpointError, DataError: bad input; nothing has been run then.
        LongextError: what the first method failed of, if all did.
    """
    from longext.evals.passkey import check_prompts
    from longext.models.hf import load_language_model
    from longext.threads import set_threads

    plans = plan_methods(config)
    directory = resolve_model(config.model, config.revision)
    base = read_model_rope(directory, config.trust_remote_code)
    tasks = _tasks(config, trained := base.spec.original_max_position_embeddings)
    for task in tasks.values():
        task.check()
    documents = tasks["perplexity"].load_data()
    set_threads(config.threads)
    model = load_language_model(config)
    if config.passkey:
        check_prompts(model, tasks["passkey"])
    plain = read_config(directory)
    results: list[Result] = []
    methods: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    for index, (name, plan) in enumerate(plans.items(), 1):
        started = time.perf_counter()
        show = _titled(progress, f"{name} ({index}/{len(plans)})")
        try:
            apply_method(model, plan, plain)
            measured = _measure(name, config, tasks, model, documents, show)
        except Exception as error:  # of one method: the others are still measured
            if num_processes() > 1 or isinstance(error, (DataError, OSError)):
                raise
            failed[name] = error.with_traceback(None)  # whose frames would keep what was in memory
            announce(f"{name:<16} failed: {_reason(error)}")
            continue
        rope, spec = (plan.parameters, plan.spec) if isinstance(plan, ExtensionPlan) else (base.parameters, base.spec)
        formula = model.remapping.spec.formula if model.remapping else described(spec)
        methods.append(_method_record(name, rope, formula, measured, time.perf_counter() - started))
        results += [Result(each) for each in measured.values()]
        announce(_one_line(methods[-1]))
    if not methods:
        raise next(iter(failed.values()))
    model.set_rope(plain)
    record = _record(config, model, results[: len(tasks)], trained, methods)
    if failed:
        record["failed"] = [{"name": name, "reason": _reason(error)} for name, error in failed.items()]
    return Comparison(results=results, record=record)


def _measure(
    name: str, config: CompareConfig, tasks: Mapping[str, Any], model: HFLanguageModel, documents: Any, show: Progress
) -> dict[str, Measured]:
    """Run the evaluations of one method."""
    data = {key: documents for key in tasks if key != "passkey"}
    return {
        key: run_eval(_with_method(task, name, config, key), model, data=data.get(key), progress=show)
        for key, task in tasks.items()
    }


def _reason(error: Exception) -> str:
    """Return why a method failed on one line."""
    text = " ".join(str(error).split())[:200].rstrip(".")
    return text if isinstance(error, LongextError) else f"{type(error).__name__}: {text}"


def _titled(progress: Progress, title: str) -> Progress:
    """Return a progress display that says which method is measured."""
    return lambda what, total, unit: progress(f"{title} {what}", total, unit)


def _tasks(config: CompareConfig, trained: int) -> dict[str, Any]:
    """Return the evaluations that every method runs through; a length within the trained window is among them."""
    check_lengths(config.lengths, minimum=2)
    lengths = tuple(sorted({*config.lengths, *(() if min(config.lengths) <= trained else (trained,))}))
    perplexity = Perplexity(**shared_settings(config, Perplexity, _OF_TASKS), lengths=lengths, protocol="sliding")
    positions = dataclasses.replace(perplexity, protocol="positional", stride=perplexity.step)
    tasks: dict[str, Any] = {"perplexity": perplexity, "positions": positions}
    if config.passkey:
        tasks["passkey"] = Passkey(**shared_settings(config, Passkey, _OF_TASKS), lengths=config.lengths)
    return tasks


def _with_method(task: Eval, name: str, config: CompareConfig, key: str) -> Any:
    """Return an evaluation of one method, with the directory of its result if the comparison has one."""
    changes: dict[str, Any] = {"method": name, "factor": None if name == "none" else config.factor}
    folder = re.sub(r"[^\w.-]+", "-", name)
    return dataclasses.replace(task, **changes, output=f"{config.output}/{folder}/{key}" if config.output else None)


def _method_record(
    name: str, rope: Any, formula: str, measured: Mapping[str, Measured], seconds: float
) -> dict[str, Any]:
    """Return what the record of a comparison has of one method."""
    rows = {key: own.record["results"] for key, own in measured.items()}
    passkey = [{key: value for key, value in row.items() if key != "accuracy"} for row in rows.get("passkey", ())]
    by_length = measured["passkey"].record["by_length"] if passkey else []
    numbers = {"perplexity": rows["perplexity"], "positions": rows["positions"], "passkey": passkey}
    return {
        "name": name,
        "rope_parameters": rope,
        "formula": formula,
        **numbers,
        "seconds": seconds,
        "passkey_by_length": by_length,
    }


def _record(
    config: CompareConfig, model: HFLanguageModel, first: Sequence[Result], trained: int, methods: Sequence[Any]
) -> dict[str, Any]:
    """Return the record of a comparison; protocols and data are those of its first method's results."""
    perplexity, positions, *passkey = (result.record for result in first)
    protocols = {
        "perplexity": {key: perplexity["protocol"][key] for key in _PERPLEXITY},
        "positions": {key: positions["protocol"][key] for key in _PERPLEXITY},
        "passkey": {key: passkey[0]["protocol"][key] for key in _PASSKEY} if passkey else None,
        "seed": config.seed,
    }
    short = max(row["length"] for row in perplexity["results"] if row["length"] <= trained)
    return result_record(
        "compare",
        model.describe(),
        protocols,
        perplexity["data"],
        trained_length=trained,
        short_length=short,
        factor=config.factor,
        methods=list(methods),
    )


def _one_line(method: Mapping[str, Any]) -> str:
    shown = "  ".join(f"{row['length']:,}: {row['ppl']:.1f}" for row in method["perplexity"])
    recalled = "  ".join(f"{row['accuracy']:.0%}" for row in method["passkey_by_length"])
    passkey = f"   passkey {recalled}" if recalled else ""
    return f"{method['name']:<16} ppl {shown}{passkey}   {method['seconds']:.0f} s"


def write_comparison(output: Path, config: CompareConfig, comparison: Comparison) -> Written:
    """Write a comparison: its record, the report on its results, and each result in METHOD/EVALUATION."""
    rendered = comparison.rendered
    with staged_directory(output, config.force, keep=True) as staging:
        for result in comparison.results:
            folder = staging / Path(result.task.output or "").relative_to(output)
            folder.mkdir(parents=True)
            name = f"eval {result.task.name}"
            single = Contents(command=name, config=result.task, record=result.record, tables=result.rendered.tables)
            write_result_files(folder, single)
        contents = Contents(
            command="compare",
            config=config,
            record=comparison.record,
            tables=comparison.table,
            figures=rendered.figures,
            extra=report_files(rendered),
        )
        return write_result_files(staging, contents)
