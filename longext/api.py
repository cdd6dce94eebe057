"""The Python API: what every command does, as a function that returns its result.

Settings are those of the commands, with underscores: `--batch-tokens 4096` is `batch_tokens=4096`. Errors are the
exceptions of `longext.errors`, and name arguments, not flags.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longext.errors import ConfigError, LongextError
from longext.extras import explain_import
from longext.settings import build_config

if TYPE_CHECKING:
    from longext.compressor.writing.conversation import Conversation
    from longext.compressor.writing.pieces import Generated
    from longext.conversion.merge import MergeResult
    from longext.models.protocol import LanguageModel
    from longext.planning.fit import TrainingPlan
    from longext.report.commands.advise import Advice
    from longext.report.commands.gate import Verdict
    from longext.report.commands.runs import Trainer
    from longext.report.outcome import Comparison, Result
    from longext.training.run import TrainingResult

_FLAG = re.compile(r"(?<![\w-])--(?:no-)?([a-z][a-z0-9-]+)")
_ADVICE = re.compile(r" Give (it|them) as an argument or flag, or in the recipe \(-c FILE\)\.")
_SPELLINGS = (
    ("the command line: ", ""),
    ("-o directory", "output directory"),
    ("another -o", "another output"),
    ("with -o", "as output"),
)
# what a model is, once it is loaded: given again, it would only label the numbers
_OF_LOADING = frozenset(
    (
        "model method factor memory segment device dtype attention revision trust_remote_code threads "
        "endpoint endpoint_model endpoint_key endpoint_timeout concurrency"
    ).split()
)
_EXTRAS = dict.fromkeys(("load", "evaluate", "compare", "advise", "gate", "generate"), ("eval",))
CallT = TypeVar("CallT", bound=Callable[..., Any])


def in_python(message: str) -> str:
    """Return an error message with `--a-flag` as `a_flag`, as a Python caller spells it."""
    message = _ADVICE.sub("", message)
    for flag, name in _SPELLINGS:
        message = message.replace(flag, name)
    return _FLAG.sub(lambda match: match[1].replace("-", "_"), message)


def _python_errors(call: CallT) -> CallT:
    """Let errors of longext name arguments, not flags."""

    @functools.wraps(call)
    def wrapped(*args: Any, **settings: Any) -> Any:
        try:
            return call(*args, **settings)
        except LongextError as error:
            error.args = (in_python(str(error)), *error.args[1:])
            raise
        except ModuleNotFoundError as error:
            absent = explain_import(error, f"longext.{call.__name__}", _EXTRAS.get(call.__name__, ()))
            if absent is None:
                raise
            raise absent from error

    return wrapped  # type: ignore[return-value]  # functools.wraps keeps the signature, which mypy cannot see


def _check_alone(settings: dict[str, Any]) -> None:
    """Raise ConfigError for what a call does not do: run in several processes, or write a directory of results."""
    if settings.get("num_processes", 1) != 1:
        raise ConfigError("num_processes: several processes are for the command line and torchrun; give 1.")
    if settings.get("output") is not None:
        raise ConfigError("output: results are returned, not written. What is returned has their `record` and tables.")


@_python_errors
def load(
    model: str | Path,
    *,
    method: str | None = None,
    factor: float | None = None,
    memory: str | None = None,
    segment: int | None = None,
    **settings: Any,
) -> LanguageModel:
    """Load a model for evaluation.

    Args:
        model: a directory, Hub id or bundled name; an adapter directory; or the output of `compress`.
        method: RoPE method to apply in memory, "yarn" or with its parameters "dynamic:alpha=4", or a method of
            position remapping, "leaky-rerope:logn=true" (`longext.attach` for a model that transformers loaded).
        factor: target length / trained length of `method`.
        memory: read by segments with this memory, as `--memory` spells it.
        segment: tokens of a segment (default: 128; a compressor has its own).
        settings: device, dtype, attention, revision, trust_remote_code, threads, seed.

    Returns:
        A `LanguageModel`: `score`, `greedy`, `encode`, `decode`, `describe`.

    Raises:
        ConfigError, CheckpointError: there is no such model, or it cannot be read that way.
    """
    from longext.compressor.checkpoint import is_compressor
    from longext.evals.base import Eval, ReadingConfig
    from longext.evals.models import open_model
    from longext.models.methods import check_method
    from longext.threads import set_threads

    check_method(method, factor)
    given: dict[str, Any] = {"method": method, "factor": factor, "memory": memory, "segment": segment}
    if memory is None and is_compressor(str(model)):
        given = {"method": method, "factor": factor, "memory": str(model)}
    elif memory is None or model:
        given["model"] = str(model)
    values = {key: value for key, value in given.items() if value is not None}
    implied = Eval.implied_defaults(values) if values.get("memory") else {}
    task = build_config(ReadingConfig, None, [], {**implied, **values, **settings})
    if task.threads is not None:  # else the program's own number stays
        set_threads(task.threads)
    opened: Any = open_model(task)
    opened.loaded_as = {key: getattr(task, key) for key in ("model", "method", "factor", "memory", "segment")}
    return opened  # type: ignore[no-any-return]  # Any, to take the attribute that the protocol does not have


@_python_errors
def evaluate(model: str | Path | LanguageModel, evaluation: str, *, progress: bool = False, **settings: Any) -> Result:
    """Measure a model.

    Args:
        model: from `load`, or what `load` takes.
        evaluation: a name that `longext eval --help` lists, or the kind of its records: "perplexity", "passkey".
        progress: show a progress bar on standard error.
        settings: the options of that evaluation.

    Returns:
        A `Result`: `table()`, `plot()`, `to_pandas()`, `record`, `save(directory)`.

    Raises:
        ConfigError, DataError, CheckpointError: something given cannot be used.
    """
    from longext.evals.base import make_eval, no_progress
    from longext.evals.runner import run_eval
    from longext.report.console import progress as progress_bar
    from longext.report.outcome import Result

    show = progress_bar if progress else no_progress
    _check_alone(settings)
    if isinstance(model, (str, Path)):
        return Result(run_eval(make_eval(evaluation, model=str(model), **settings), progress=show))
    if fixed := sorted(_OF_LOADING.intersection(settings)):
        raise ConfigError(f"{', '.join(fixed)}: the model is loaded already. Give them to longext.load.")
    loaded_as = {key: value for key, value in getattr(model, "loaded_as", {"model": model.name}).items() if value}
    return Result(run_eval(make_eval(evaluation, **{**loaded_as, **settings}), model, progress=show))


@_python_errors
def compare(
    model: str | Path, methods: Sequence[str] | None = None, *, progress: bool = False, **settings: Any
) -> Comparison:
    """Measure every method on the same documents, seeds and protocols.

    Args:
        model: a directory, Hub id or bundled name.
        methods: RoPE methods; those of `longext compare` by default.
        progress: show progress bars on standard error.
        settings: the options of `longext compare`: factor, data, lengths, depths, ...

    Returns:
        A `Comparison`: `results`, `table()`, `report(file)`.
    """
    from longext.evals.base import no_progress
    from longext.report.compare import compare_methods
    from longext.report.config import CompareConfig
    from longext.report.console import progress as progress_bar

    _check_alone(settings)
    chosen = {} if methods is None else {"methods": tuple(methods)}
    config = build_config(CompareConfig, None, [], {"model": str(model), **chosen, **settings})
    return compare_methods(config, progress_bar if progress else no_progress)


@_python_errors
def advise(model: str | Path, target_length: int, *, progress: bool = False, **settings: Any) -> Advice:
    """Try methods on your own text and say which one to take for a length.

    Args:
        model: a directory, Hub id or bundled name.
        target_length: tokens that the model should reach.
        progress: show the estimate and a progress bar on standard error.
        settings: the options of `longext advise`: data, methods, minutes, num_places, ...

    Returns:
        An `Advice`: `answer`, `method()` as `load` takes it, `commands`, `table()`, `plot()`, `record`.
    """
    from longext.evals.base import no_progress
    from longext.evals.candidates import try_methods
    from longext.report.commands.advise import Advice
    from longext.report.config import AdviseConfig
    from longext.report.console import progress as progress_bar
    from longext.report.console import say

    _check_alone(settings)
    given = {"model": str(model), "target_length": target_length, **settings}
    config = build_config(AdviseConfig, None, [], given)
    show, tell = (progress_bar, lambda text: say(text, aside=True)) if progress else (no_progress, lambda text: None)
    return Advice(try_methods(config, show, tell))


@_python_errors
def gate(model: str | Path, *, progress: bool = False, **settings: Any) -> Verdict:
    """Decide whether a model passes: accuracy and perplexity at given lengths, with as little asking as that takes.

    Args:
        model: a directory, Hub id or bundled name.
        progress: show progress bars on standard error.
        settings: the options of `longext gate`: lengths, fail_under, fail_over, baseline, error_rate, method, ...

    Returns:
        A `Verdict`, true if every check passed: `passed`, `require()` (raises LongextError), `table()`, `record`.

    Raises:
        ConfigError, CheckpointError, DataError: something given cannot be used.
    """
    from longext.evals.base import no_progress
    from longext.report.commands.gate import Verdict, append_summary, run_gate
    from longext.report.config import GateConfig
    from longext.report.console import progress as progress_bar

    _check_alone(settings)
    config = build_config(GateConfig, None, [], {"model": str(model), **settings})
    record = run_gate(config, progress_bar if progress else no_progress)
    if config.summary:
        append_summary(config, record)
    return Verdict(record)


@_python_errors
def extend(model: str | Path, method: str, *, output: str | Path | None = None, **settings: Any) -> Path:
    """Write a checkpoint whose RoPE reaches further; the weights are linked, never loaded.

    Args:
        model: a directory, Hub id, bundled name, or a .gguf file.
        method: "linear", "ntk", "ntk-by-parts", "dynamic", "yarn", "longrope", "llama3", "abf".
        output: the directory to write; named after model, method and length by default.
        settings: factor or target_length, and the options of `longext extend`.

    Returns:
        The directory, a standard checkpoint; or the file.
    """
    from longext.checkpoint.gguf import is_gguf
    from longext.conversion.config import ExtendConfig
    from longext.conversion.extend import extend_checkpoint
    from longext.conversion.gguf.extend import extend_gguf

    given = {"model": str(model), "method": method, "output": None if output is None else str(output)}
    config = build_config(ExtendConfig, None, [], {**given, **settings})
    write = extend_gguf if is_gguf(model) else extend_checkpoint
    write(dataclasses.replace(config, output=config.named_output))
    return Path(config.named_output)


@_python_errors
def search(
    model: str | Path, target_length: int | None = None, *, output: str | Path, progress: bool = False, **settings: Any
) -> Path:
    """Search RoPE frequencies on your own text, and write them with a checkpoint that has them.

    Args:
        model: a directory, Hub id or bundled name.
        target_length: in tokens.
        output: the directory to write; a search that was cut short goes on from the journal beside it.
        progress: show progress bars on standard error.
        settings: data, searcher, evaluations, and the other options of `longext search`.

    Returns:
        The directory: result.json, factors.json, curve.png, and `checkpoint`, a standard one.
    """
    from longext.evals.base import no_progress
    from longext.report.commands.search import search_and_write
    from longext.report.console import progress as progress_bar
    from longext.searching.config import SearchConfig

    given = {"model": str(model), "target_length": target_length, "output": str(output)}
    config = build_config(SearchConfig, None, [], {**given, **settings})
    search_and_write(config, Path(output), progress_bar if progress else no_progress, lambda line: None)
    return Path(output)


@_python_errors
def finetune(
    model: str | Path, *, data: str | Path, output: str | Path, progress: bool = False, **settings: Any
) -> TrainingResult:
    """Extend a checkpoint and train it at the new length, in this process.

    Args:
        model: a directory, Hub id or bundled name.
        data: text file, folder, .jsonl, .parquet, Hub dataset id, or "sample".
        output: the directory to write: an adapter, or with `tuning="full"` a checkpoint.
        progress: show a progress bar on standard error.
        settings: the options of `longext finetune`: method, target_length, num_steps, ...

    Returns:
        The `directory`, the `record` of what was trained, and the lines of `metrics`.
    """
    from longext.evals.midway import make_perplexity_measure
    from longext.report.commands.runs import Trainer
    from longext.report.commands.training import FINETUNE
    from longext.training.config import FinetuneConfig
    from longext.training.longlora import plan_finetune

    config = build_config(FinetuneConfig, None, [], _training(model, data, output, settings))
    return _train(config, Trainer(plan_finetune, make_perplexity_measure, FINETUNE), progress)


@_python_errors
def compress(
    model: str | Path, *, data: str | Path, output: str | Path, progress: bool = False, **settings: Any
) -> TrainingResult:
    """Train a compressor on a frozen model, in this process.

    Args:
        model: a directory, Hub id or bundled name.
        data: text file, folder, .jsonl, .parquet, Hub dataset id, or "sample".
        output: the directory to write; `load` and `generate` take it.
        progress: show a progress bar on standard error.
        settings: the options of `longext compress-train`: arch, segment, ratio, num_steps, ...

    Returns:
        The `directory`, the `record` of what was trained, and the lines of `metrics`.
    """
    from longext.compressor.config import CompressConfig
    from longext.compressor.train import plan_compressor
    from longext.evals.midway import make_memory_measure
    from longext.report.commands.runs import Trainer
    from longext.report.commands.training import COMPRESS

    config = build_config(CompressConfig, None, [], _training(model, data, output, settings))
    return _train(config, Trainer(plan_compressor, make_memory_measure, COMPRESS), progress)


def _training(model: str | Path, data: str | Path, output: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
    return {"model": str(model), "data": str(data), "output": str(output), **settings}


def _train(config: Any, trainer: Trainer, shows_progress: bool) -> TrainingResult:
    from longext.evals.base import no_progress
    from longext.report.commands.runs import plan_run, train_and_write
    from longext.report.console import progress
    from longext.staging import release_outputs

    _check_alone({"num_processes": config.num_processes})
    try:
        planned = plan_run(config, trainer)
        show = progress if shows_progress else no_progress
        trained = train_and_write(planned, lambda plan, work: plan.load(work), show, lambda training: None)
    finally:
        release_outputs()
    assert trained is not None, "one process is the main one"
    return dataclasses.replace(trained[0], directory=planned.output)


@_python_errors
def merge(adapter: str | Path, *, output: str | Path, **settings: Any) -> MergeResult:
    """Merge a LoRA adapter into a standard checkpoint, checked by logits before it appears.

    Args:
        adapter: an adapter directory or Hub id.
        output: the directory to write.
        settings: base, dtype, check, revision, force.
    """
    from longext.conversion.config import MergeConfig
    from longext.conversion.merge import merge_adapter

    return merge_adapter(
        build_config(MergeConfig, None, [], {"adapter": str(adapter), "output": str(output), **settings})
    )


@_python_errors
def generate(model: str | Path, prompt: str = "", **settings: Any) -> Generated:
    """Continue a text with a model, or with a compressor after a context of any length.

    Args:
        model: what `load` takes, or the output of `compress`.
        prompt: the text to continue.
        settings: context, max_new_tokens, temperature, top_p, and the other options of `longext generate`.

    Returns:
        The new `text` and `tokens`, and what was read.
    """
    from longext.compressor.config import GenerateConfig
    from longext.compressor.writing.generation import open_writer

    writer = open_writer(build_config(GenerateConfig, None, [], {"model": str(model), "prompt": prompt, **settings}))
    writer.read(lambda amount: None)
    return writer.write(lambda text: None)


@_python_errors
def chat(model: str | Path = "", *, context: str | Path | Sequence[str | Path] = (), **settings: Any) -> Conversation:
    """Open a conversation with a model, or a compressor, or on a memory file.

    Args:
        model: what `load` takes, or the output of `compress`; may be left out where `memory` is a file.
        context: text files to read first.
        settings: memory, method, factor, system, stop, max_new_tokens, and the other options of `longext chat`.

    Returns:
        A `Conversation`: `read(text)`, `ask(question)`, `stream(question)` (pieces as they come), `ask_all(questions)`
        (at once, each alone), `add(role, text)`, `messages`, `save(file)`, `reset()`.
    """
    from longext.compressor.config import ConversationConfig
    from longext.compressor.writing.generation import read_context
    from longext.compressor.writing.talking import open_conversation

    names = [context] if isinstance(context, (str, Path)) else list(context)
    given = {"model": str(model), "context": tuple(map(str, names)), **settings}
    config = build_config(ConversationConfig, None, [], given)
    conversation = open_conversation(config)
    for name in config.context:
        conversation.read(read_context(name), Path(name).name)
    return conversation


@_python_errors
def build_memory(
    documents: str | Path | Sequence[str | Path], *, output: str | Path, progress: bool = False, **settings: Any
) -> dict[str, Any]:
    """Read documents once and keep their memory in a file, from which `chat` and `generate` go on (memory=FILE).

    Args:
        documents: text files, folders of them, or "sample".
        output: the file to write.
        progress: show a progress bar on standard error.
        settings: memory, model, segment, and the other options of `longext memory`.

    Returns:
        What the file holds: tokens, slots, bytes, fingerprint of the model, documents.
    """
    from longext.compressor.config import BuildConfig
    from longext.compressor.writing.building import Builder
    from longext.evals.base import no_progress
    from longext.report.console import progress as progress_bar

    sources = [documents] if isinstance(documents, (str, Path)) else list(documents)
    given = {"action": "build", "sources": tuple(map(str, sources)), "output": str(output), **settings}
    builder = Builder(build_config(BuildConfig, None, [], given))
    with (progress_bar if progress else no_progress)("reading", builder.num_unread, "tokens") as advance:
        return builder.build(advance)


@_python_errors
def plan(model: str | Path, length: int, **settings: Any) -> TrainingPlan:
    """Return the memory, FLOPs and time of a training run before it is paid for.

    Args:
        model: a directory, Hub id or bundled name; only its config is read.
        length: tokens of a training row.
        settings: gpus, method, batch_size, and the other options of `longext plan`.
    """
    from longext.planning.config import PlanConfig
    from longext.planning.fit import plan_training

    return plan_training(build_config(PlanConfig, None, [], {"model": str(model), "length": length, **settings}))
