"""`longext eval needle`: RULER's needle tasks by length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.output import deliver, open_output
from longext.evals.config import NeedleConfig

if TYPE_CHECKING:
    from longext.evals.retrieval import Outcome

_DEFAULT = NeedleConfig(model="")


@eval_app.command("needle")
def needle(
    ctx: typer.Context,
    model: opt.Model = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="single, multikey, multivalue, multiquery, or RULER's own niah_single_1 ... niah_multiquery, "
            "comma-separated."
        ),
    ] = opt.join(_DEFAULT.tasks),
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer budget together, comma-separated.")
    ] = opt.join(_DEFAULT.lengths),
    depths: Annotated[
        str | None, typer.Option(help="Depths of the needle asked for, 0 to 1, comma-separated (default: random).")
    ] = None,
    num_trials: opt.NumTrials = _DEFAULT.num_trials,
    num_needles: Annotated[
        int, typer.Option(help="Needles of multikey, multivalue and multiquery.")
    ] = _DEFAULT.num_needles,
    haystack: Annotated[
        str, typer.Option(help="noise, needles (more of their kind), book (the bundled story) or a text file.")
    ] = _DEFAULT.haystack,
    key_type: Annotated[str, typer.Option(help="Keys are words, numbers or uuids.")] = _DEFAULT.key_type,
    value_type: Annotated[str, typer.Option(help="Values are words, numbers or uuids.")] = _DEFAULT.value_type,
    scoring: Annotated[
        str,
        typer.Option(help="match (RULER's: generate, find the values) or exact (one forward pass over the answer)."),
    ] = _DEFAULT.scoring,
    max_new_tokens: Annotated[int, typer.Option(help="Answer budget of match.")] = _DEFAULT.max_new_tokens,
    chat_template: opt.ChatTemplate = None,
    template_arg: opt.TemplateArg = None,
    strip_thinking: opt.StripThinking = None,
    neutralise_control_tokens: opt.NeutraliseControlTokens = False,
    answer_prefix: Annotated[
        bool,
        typer.Option(
            "--answer-prefix/--no-answer-prefix",
            help="End prompts with the beginning of the answer, as RULER (never inside a thought).",
        ),
    ] = _DEFAULT.answer_prefix,
    fail_under: opt.FailUnder = None,
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
    """Hide one or several sentences in a haystack and ask for them: score by task and length, heat map, JSON.

    Example: longext eval needle MODEL --lengths 4096,16384 --haystack essays.txt
    """
    _run(opt.config_with_memory(ctx, NeedleConfig, recipe, settings), as_json)


def _run(config: NeedleConfig, as_json: bool) -> None:
    from longext.cli.answering import kept_answers
    from longext.cli.models import open_model
    from longext.evals.limits import place_bars, require_bars
    from longext.evals.retrieval import answer_lines, outcome_verdicts, partial_predictions
    from longext.evals.ruler.needle import (
        check_needle_config,
        make_questions,
        needle_notes,
        needle_record,
        timed_needles,
    )
    from longext.report.console import progress
    from longext.report.results import output_directory

    check_needle_config(config)
    places = [(task, str(length)) for task in config.tasks for length in sorted(config.lengths)]
    bars = place_bars(config.fail_under, places)
    output = output_directory(config.output, "needle", config.model)
    open_output(output, config)
    model = open_model(config)
    questions = make_questions(model, config)
    partial = partial_predictions(output) if config.scoring == "match" else None
    with kept_answers(partial, output, config):
        with progress("needle", len(questions), "prompts") as advance:
            outcomes, answers, seconds = timed_needles(model, questions, config, partial, advance)
        notes = needle_notes(model, config, answers.values())
        record = needle_record(model, config, outcomes, seconds, questions, notes)
        record["bars"] = outcome_verdicts(bars, outcomes)
        expected = {question.id: question.prompt.answers for question in questions}
        extra = {"answers.jsonl": answer_lines(outcomes, expected, answers)} if answers else {}
        _show(config, output, record, outcomes, extra, as_json)
    require_bars(record)


def _show(
    config: NeedleConfig,
    output: Path,
    record: dict[str, Any],
    outcomes: Sequence[Outcome],
    extra: dict[str, str],
    as_json: bool,
) -> None:
    from longext.evals.retrieval import cells_of, pooled_cells
    from longext.evals.ruler.needle import PASS_BAR
    from longext.report.retrieval_views import needle_depth_maps, retrieval_heat_map, retrieval_table

    title = f"Needles in a haystack: {opt.titled(config)} ({config.scoring})"
    caption = f"RULER counts a length as reached at {100 * PASS_BAR:.1f}% over all of its 13 tasks"
    rows = [*record["by_task"], *(record["by_length"] if len(config.tasks) > 1 else [])]
    deliver(
        output,
        "eval needle",
        config,
        record,
        lambda: [retrieval_table(title, cells_of(outcomes, by_depth=False), pooled_cells(outcomes), caption=caption)],
        lambda: {
            "needle": needle_depth_maps(record["results"], title=f"{title}, %")
            if config.depths
            else retrieval_heat_map(rows, title=f"{title}, %")
        },
        as_json=as_json,
        notes=record["notes"],
        extra=extra,
    )
