"""`longext eval babilong`: bAbI facts in long text."""

from __future__ import annotations

from typing import Annotated

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.output import deliver, open_output
from longext.evals.config import BABILongConfig

_DEFAULT = BABILongConfig(model="")


@eval_app.command("babilong")
def babilong(
    ctx: typer.Context,
    model: opt.Model = None,
    data: Annotated[str, typer.Option(help="Folder with <length>/<task>.jsonl, as 4k/qa1.jsonl.")] = _DEFAULT.data,
    tasks: Annotated[str, typer.Option(help="Of qa1 to qa5, comma-separated.")] = opt.join(_DEFAULT.tasks),
    lengths: Annotated[
        str | None, typer.Option(help="Lengths as the folders name them: 0k,4k (default: all in --data).")
    ] = None,
    num_cases: Annotated[int | None, typer.Option(help="Rows of each task and length, at most.")] = None,
    prompt: Annotated[
        str, typer.Option(help="examples (instruction and examples), instruction, or plain (text and question).")
    ] = _DEFAULT.prompt,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = _DEFAULT.max_new_tokens,
    chat_template: opt.ChatTemplate = None,
    template_arg: opt.TemplateArg = None,
    strip_thinking: opt.StripThinking = None,
    neutralise_control_tokens: opt.NeutraliseControlTokens = False,
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
    """Answer questions on facts that are scattered in a long text: accuracy by task and length, heat map, JSON.

    Example: longext eval babilong MODEL --data babilong/ --tasks qa1,qa2 --lengths 0k,4k
    """
    _run(opt.config_with_memory(ctx, BABILongConfig, recipe, settings), as_json)


def _run(config: BABILongConfig, as_json: bool) -> None:
    from longext.cli.answering import kept_answers
    from longext.cli.models import open_model
    from longext.data.json_lines import repeated_note
    from longext.evals.babilong import babilong_record, check_babilong_config, evaluate_babilong
    from longext.evals.babilong_data import length_name, read_rows
    from longext.evals.limits import place_bars, require_bars
    from longext.evals.retrieval import (
        answer_lines,
        cells_of,
        outcome_verdicts,
        partial_predictions,
        pooled_cells,
        window_notes,
    )
    from longext.models.answers import answer_notes
    from longext.report.console import progress
    from longext.report.results import output_directory
    from longext.report.retrieval_views import retrieval_heat_map, retrieval_table

    check_babilong_config(config)
    output = output_directory(config.output, "babilong", config.model)
    open_output(output, config)
    rows = read_rows(config.data, config.tasks, config.lengths, config.num_cases)
    bars = place_bars(config.fail_under, [(row.task, length_name(row.length)) for row in rows])
    model = open_model(config)
    partial = partial_predictions(output)
    with kept_answers(partial, output, config):
        with progress("babilong", len(rows), "rows") as advance:
            outcomes, answers, seconds = evaluate_babilong(model, rows, config, partial, advance)
        asked = ((f"{row.task} at {length_name(row.length)}", (row.text, row.question)) for row in rows)
        notes = [*repeated_note(asked), *window_notes(model, outcomes, config), *answer_notes(answers.values())]
        record = babilong_record(model, config, rows, outcomes, seconds, answers.values(), notes)
        record["bars"] = outcome_verdicts(bars, outcomes, length_name)
        title = f"BABILong: {opt.titled(config)}"
        shown = [*record["results"], *(record["by_length"] if len(config.tasks) > 1 else [])]
        extra = {"answers.jsonl": answer_lines(outcomes, {row.id: [row.target] for row in rows}, answers)}
        deliver(
            output,
            "eval babilong",
            config,
            record,
            lambda: [retrieval_table(title, cells_of(outcomes), pooled_cells(outcomes), label=length_name, size="")],
            lambda: {
                "babilong": retrieval_heat_map(shown, title=f"{title}, %", label=length_name, size="length of the text")
            },
            as_json=as_json,
            notes=notes,
            extra=extra,
        )
    require_bars(record)
