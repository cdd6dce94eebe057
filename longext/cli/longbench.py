"""`longext eval longbench`: LongBench under its authors' protocol, or lm-eval's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.output import deliver, open_output, show
from longext.evals.config import LongBenchConfig

if TYPE_CHECKING:
    from longext.evals.longbench.run import TaskRun
    from longext.models.protocol import LanguageModel

_DEFAULT = LongBenchConfig(model="")
_COMMAND = "eval longbench"


@eval_app.command("longbench")
def longbench(
    ctx: typer.Context,
    model: opt.Model = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, comma-separated (default: all).", show_default=False)
    ] = None,
    backend: Annotated[
        str, typer.Option(help="official, or lm-eval: its own prompts, cuts and metrics, another protocol.")
    ] = _DEFAULT.backend,
    longbench_e: Annotated[bool, typer.Option("--e", help="LongBench-E: 13 tasks, scores by length.")] = False,
    data: Annotated[str, typer.Option(help="Folder with <task>.jsonl files, or hub.")] = _DEFAULT.data,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt; longer ones lose their middle (default: by the context). lm-eval: of prompt and "
            "answer; the beginning goes."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows of each task.")] = None,
    chat_template: opt.ChatTemplate = None,
    template_arg: opt.TemplateArg = None,
    strip_thinking: opt.StripThinking = None,
    neutralise_control_tokens: opt.NeutraliseControlTokens = False,
    predictions: Annotated[
        str | None,
        typer.Option(help="Score these answers (<task>.jsonl in the authors' schema); MODEL only names them."),
    ] = None,
    code_similarity: Annotated[
        str, typer.Option(help="difflib, or levenshtein (the authors' score where python-Levenshtein is installed).")
    ] = _DEFAULT.code_similarity,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="TASK=SCORE, english=SCORE or chinese=SCORE, 0 to 100: exit with 1 below it; may be repeated."
        ),
    ] = None,
    method: opt.Method = None,
    factor: opt.Factor = None,
    batch_tokens: opt.BatchTokens = None,
    memory: opt.Memory = None,
    segment: opt.SegmentLength = _DEFAULT.segment,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only go on with an unfinished run of the same -o; start none.")
    ] = False,
    device: opt.Device = _DEFAULT.device,
    dtype: opt.Dtype = _DEFAULT.dtype,
    attention: opt.Attention = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    output: opt.Results = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Answer and score LongBench as its authors do: prompts, middle cut, 21 tasks, averages; resumable.

    Example: longext eval longbench MODEL --data longbench/ --tasks hotpotqa,qasper -o out

    Published answers: longext eval longbench --predictions pred/longalpaca-7b-16k
    """
    given = opt.config_from(ctx, LongBenchConfig, recipe, settings, {"model": ""})
    if given.predictions is None:
        given = opt.config_with_memory(ctx, LongBenchConfig, recipe, settings)
    if given.backend == "lm-eval":
        _run_lm_eval(given, as_json)
    elif given.predictions is not None:
        _score(given, as_json)
    else:
        _run(given, as_json)


def _score(config: LongBenchConfig, as_json: bool) -> None:
    """Score answers that were given."""
    import time

    from longext.evals.limits import require_bars
    from longext.evals.longbench.run import longbench_record, read_answers, score_notes, score_runs
    from longext.evals.longbench.suite import bar_verdicts, check_bars, check_longbench_config
    from longext.report.longbench_views import longbench_bars, longbench_tables
    from longext.report.results import output_directory

    check_longbench_config(config)
    name = config.model or Path(str(config.predictions)).name
    output = output_directory(config.output, "longbench", name)
    open_output(output, config)
    started = time.perf_counter()
    runs, notes = read_answers(config)
    check_bars(config, [run.name for run in runs])
    scores = score_runs(runs, config)
    notes += score_notes(scores, config)
    record = longbench_record(None, runs, scores, config, notes, time.perf_counter() - started)
    record["bars"] = bar_verdicts(config, scores)
    deliver(
        output,
        _COMMAND,
        config,
        record,
        lambda: longbench_tables(name, record),
        lambda: {"longbench": longbench_bars(record, title=f"{name}: {record['protocol']['id']}")},
        as_json=as_json,
        notes=notes,
    )
    require_bars(record)


def _run(config: LongBenchConfig, as_json: bool) -> None:
    """Make answers and score them."""
    from longext.cli.models import open_model
    from longext.evals.limits import require_bars
    from longext.evals.longbench.run import load_tasks, prepare_requests
    from longext.evals.longbench.suite import check_bars, check_longbench_config
    from longext.manifest import read_manifest
    from longext.report.results import output_directory
    from longext.training.directory import check_directories, open_run, working_directory

    check_longbench_config(config)
    output = output_directory(config.output, "longbench", config.model)
    work = working_directory(output)
    # a run is taken up as a training is, but unasked: its answers say themselves what they belong to
    is_begun = "longbench_e" in read_manifest(work).get("config", {})
    run: Any = dataclasses.replace(config, resume=config.resume or is_begun)
    check_directories(run, output, Path(config.model).expanduser())
    runs, notes = load_tasks(config)
    check_bars(config, [own.name for own in runs])
    model: LanguageModel = open_model(config)
    prepare_requests(model, runs, config)
    open_run(run, work, output, _COMMAND)
    with _kept_once_answered(work, output, config):
        record = _answer_and_finish(model, runs, config, work, output, notes, as_json)
    require_bars(record)


def _answer_and_finish(
    model: LanguageModel,
    runs: list[TaskRun],
    config: LongBenchConfig,
    work: Path,
    output: Path,
    notes: list[str],
    as_json: bool,
) -> dict[str, Any]:
    """Answer what is open, score, write; return the record."""
    import shutil
    import time

    from longext.evals.longbench import run as steps
    from longext.evals.longbench.suite import bar_verdicts
    from longext.report.console import progress, say
    from longext.report.longbench_views import longbench_bars, longbench_tables
    from longext.report.results import write_result_files
    from longext.training.directory import close_run

    started = time.perf_counter()
    with progress("longbench", sum(len(run.rows) for run in runs), "answers") as advance:
        steps.generate_answers(model, runs, work, config, advance)
    scores = steps.score_runs(runs, config)
    notes = [*notes, *steps.model_notes(model, runs, config), *steps.score_notes(scores, config)]
    record = steps.longbench_record(model, runs, scores, config, notes, time.perf_counter() - started)
    record["bars"] = bar_verdicts(config, scores)
    name = opt.titled(config)
    steps.write_predictions(runs, work / steps.PREDICTIONS)
    written = write_result_files(
        work,
        _COMMAND,
        config,
        record,
        lambda: longbench_tables(name, record),
        lambda: {"longbench": longbench_bars(record, title=f"{name}: {record['protocol']['id']}")},
    )
    shutil.rmtree(work / steps.GENERATED)
    close_run(work, output)
    show(record, written.tables, as_json=as_json, notes=notes, warnings=written.notes)
    say(f"Results: {output} ({', '.join(written.names)}, {steps.PREDICTIONS}/)", aside=as_json)
    return record


def _run_lm_eval(config: LongBenchConfig, as_json: bool) -> None:
    """Run the tasks as lm-eval defines them."""
    import time

    from longext.cli.answering import kept_answers
    from longext.cli.models import open_model
    from longext.evals.harness.suite import harness_notes, open_scorer, partial_folder, run_harness, sample_lines
    from longext.evals.limits import require_bars
    from longext.evals.longbench import lm_eval_backend as steps
    from longext.evals.longbench.run import load_tasks, score_notes
    from longext.evals.longbench.suite import bar_verdicts, check_bars, check_longbench_config
    from longext.report.console import progress
    from longext.report.longbench_views import lm_eval_tables, longbench_bars
    from longext.report.results import output_directory

    steps.check_lm_eval_config(config)
    check_longbench_config(config)
    output = output_directory(config.output, "longbench-lm-eval", config.model)
    open_output(output, config)
    runs, notes = load_tasks(config)
    names = [run.name for run in runs]
    check_bars(config, names)
    settings = steps.harness_settings(config, names)
    tasks = steps.load_lm_eval_tasks(runs, settings)
    model: LanguageModel = open_model(config)
    started, folder = time.perf_counter(), partial_folder(output)
    with kept_answers(folder, output, config):
        with progress("longbench, lm-eval", tasks.num_documents(None), "answers") as advance:
            scorer = open_scorer(model, settings, advance, folder)
            results = run_harness(scorer, tasks, settings)
        scores = steps.lm_eval_scores(results, scorer, runs)
        notes = [steps.lm_eval_note(), *notes, *harness_notes(scorer, [], settings), *score_notes(scores, config)]
        record = steps.lm_eval_record(scorer, results, runs, scores, config, notes, time.perf_counter() - started)
        record["bars"] = bar_verdicts(config, scores)
        name = opt.titled(config)
        title = f"{name}: {steps.PROTOCOL} (not comparable with {steps.OFFICIAL})"
        deliver(
            output,
            _COMMAND,
            config,
            record,
            lambda: lm_eval_tables(name, record),
            lambda: {"longbench": longbench_bars(record, title=title)},
            as_json=as_json,
            notes=notes,
            extra={"samples.jsonl": sample_lines(results)},
        )
    require_bars(record)


@contextlib.contextmanager
def _kept_once_answered(work: Path, output: Path, config: LongBenchConfig) -> Iterator[None]:
    """Where a run ends early: say how it goes on, or remove its directory where no prompt was answered."""
    import shutil

    from longext.cli.answering import tell_how_to_go_on
    from longext.errors import ConfigError
    from longext.evals.longbench.run import GENERATED
    from longext.staging import OutputTaken

    try:
        yield
    except (ConfigError, OutputTaken):  # other settings than those it was begun with; a name that was taken
        raise
    except BaseException:
        if work.is_dir() and not tell_how_to_go_on(work / GENERATED, output, config):
            shutil.rmtree(work, ignore_errors=True)
        raise
