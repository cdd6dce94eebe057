"""`longext eval longeval`: LMSYS's line and topic retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.output import deliver, open_output
from longext.evals.config import LongEvalConfig
from longext.evals.limits import PLACES

if TYPE_CHECKING:
    from longext.evals.longeval_data import LongEvalCase
    from longext.evals.retrieval import RetrievalCell

_DEFAULT = LongEvalConfig(model="")
_COMMAND = "eval longeval"
_FORM = PLACES.replace("LENGTH", "SIZE")


@eval_app.command("longeval")
def longeval(
    ctx: typer.Context,
    model: opt.Model = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder with <n>_lines.jsonl, <n>_topics.jsonl (default: lines are generated)."),
    ] = None,
    predictions: Annotated[str | None, typer.Option(help="Score this file of answers; no model is run.")] = None,
    tasks: Annotated[str, typer.Option(help="Of lines and topics, comma-separated.")] = opt.join(_DEFAULT.tasks),
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Numbers of lines or topics, comma-separated (default: all in --data; generated: 20,50,100)."
        ),
    ] = None,
    num_cases: Annotated[int, typer.Option(help="Cases of each size, at most.")] = _DEFAULT.num_cases,
    complete: Annotated[
        bool, typer.Option("--complete", help="Give the beginning of the answer, for models that only continue.")
    ] = False,
    chat_template: opt.ChatTemplate = None,
    template_arg: opt.TemplateArg = None,
    strip_thinking: opt.StripThinking = None,
    neutralise_control_tokens: opt.NeutraliseControlTokens = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(help=f"{_FORM}, a share of 0 to 1 (0.9 for 90%): exit with 1 below it; may be repeated."),
    ] = None,
    method: opt.Method = None,
    factor: opt.Factor = None,
    batch_tokens: opt.BatchTokens = None,
    memory: opt.Memory = None,
    segment: opt.SegmentLength = _DEFAULT.segment,
    device: opt.Device = _DEFAULT.device,
    dtype: opt.Dtype = _DEFAULT.dtype,
    attention: opt.Attention = None,
    seed: opt.Seed = _DEFAULT.seed,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    output: opt.Results = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Ask for one line of many, or the first topic of a conversation: accuracy by size with Wilson intervals.

    Example: longext eval longeval MODEL --data longeval/ --tasks lines --sizes 200,300

    Published answers: longext eval longeval --predictions 200_response.txt
    """
    given = opt.config_from(ctx, LongEvalConfig, recipe, settings, {"model": ""})
    if given.predictions is not None:
        _score(given, as_json)
    else:
        _run(opt.config_with_memory(ctx, LongEvalConfig, recipe, settings), as_json)


def _score(config: LongEvalConfig, as_json: bool) -> None:
    """Score answers that were given."""
    from longext.evals.limits import place_bars, require_bars
    from longext.evals.longeval import check_longeval_config, longeval_record, score_published
    from longext.evals.retrieval import cells_of, outcome_verdicts
    from longext.report.results import output_directory

    check_longeval_config(config)
    path = Path(str(config.predictions)).expanduser()
    name = config.model or path.stem
    output = output_directory(config.output, "longeval", name)
    open_output(output, config)
    found = score_published(path)
    cells = cells_of(found.outcomes)
    bars = place_bars(config.fail_under, [(cell.task, str(cell.length)) for cell in cells], form=_FORM)
    record = longeval_record(None, config, found.outcomes, stated_accuracy=found.stated)
    record["bars"] = outcome_verdicts(bars, found.outcomes)
    notes = [] if found.stated is None else [f"The file itself states an accuracy of {found.stated:g}."]
    _show(config, name, output, record, cells, {}, notes, as_json)
    require_bars(record)


def _run(config: LongEvalConfig, as_json: bool) -> None:
    """Make answers and score them."""
    from longext.cli.answering import kept_answers
    from longext.cli.models import open_model
    from longext.evals.limits import place_bars, require_bars
    from longext.evals.longeval import (
        case_ids,
        check_longeval_config,
        evaluate_longeval,
        load_cases,
        longeval_record,
    )
    from longext.evals.retrieval import (
        answer_lines,
        cells_of,
        outcome_verdicts,
        partial_predictions,
        window_notes,
    )
    from longext.models.answers import answer_notes
    from longext.report.console import progress
    from longext.report.results import output_directory

    check_longeval_config(config)
    output = output_directory(config.output, "longeval", config.model)
    open_output(output, config)
    cases = load_cases(config)
    bars = place_bars(config.fail_under, [(case.task, str(case.size)) for case in cases], form=_FORM)
    model = open_model(config)
    partial = partial_predictions(output)
    with kept_answers(partial, output, config):
        with progress("longeval", len(cases), "cases") as advance:
            outcomes, answers, seconds = evaluate_longeval(model, cases, config, partial, advance)
        made = answers.values()
        notes = [*_notes(config, cases), *window_notes(model, outcomes, config), *answer_notes(made)]
        record = longeval_record(model, config, outcomes, cases, made, seconds=seconds, notes=notes)
        record["bars"] = outcome_verdicts(bars, outcomes)
        expected = {name: [case.expected] for name, case in zip(case_ids(cases), cases, strict=True)}
        extra = {"answers.jsonl": answer_lines(outcomes, expected, answers)}
        _show(config, opt.titled(config), output, record, cells_of(outcomes), extra, notes, as_json)
    require_bars(record)


def _notes(config: LongEvalConfig, cases: Sequence[LongEvalCase]) -> list[str]:
    from longext.data.json_lines import repeated_note

    there = {case.task for case in cases}
    left = [task for task in config.tasks if task not in there]
    source = f"{config.data} has none" if config.data else "their conversations come with --data"
    absent = [f"{task.capitalize()} were not asked for: {source}." for task in left]
    return [*absent, *repeated_note((f"{case.size} {case.task}", case.prompt) for case in cases)]


def _show(
    config: LongEvalConfig,
    name: str,
    output: Path,
    record: dict[str, Any],
    cells: list[RetrievalCell],
    extra: dict[str, str],
    notes: list[str],
    as_json: bool,
) -> None:
    from longext.report.retrieval_views import accuracy_by_size, prompt_table

    title = f"LongEval: {name}"
    deliver(
        output,
        _COMMAND,
        config,
        record,
        lambda: [prompt_table(title, cells)],
        lambda: {"longeval": accuracy_by_size(record["results"], title=title)},
        as_json=as_json,
        notes=notes,
        extra=extra,
    )
