"""`longext eval harness`: any task of lm-evaluation-harness."""

from __future__ import annotations

from typing import Annotated

import typer

from longext.cli import options as opt
from longext.cli.evaluate import eval_app
from longext.cli.output import deliver, open_output
from longext.evals.config import HarnessConfig

_DEFAULT = HarnessConfig(model="")
_COMMAND = "eval harness"


@eval_app.command("harness")
def harness(
    ctx: typer.Context,
    model: opt.Model = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or groups of lm-eval, comma-separated.", show_default=False)
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Folder with task files of your own (*.yaml; the Python beside them is run).")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            help="key=value for tasks that make their own data (RULER: max_seq_lengths=[4096,8192]; tokenizer is "
            "MODEL's by default); may be repeated."
        ),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in a prompt (default: the task's own).")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens read at once; longer inputs lose their beginning (default: the context).")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Ask through the tokenizer's chat template (default: no, as lm-eval).",
            show_default=False,
        ),
    ] = None,
    template_arg: opt.TemplateArg = None,
    strip_thinking: opt.StripThinking = None,
    neutralise_control_tokens: opt.NeutraliseControlTokens = False,
    system_instruction: Annotated[str | None, typer.Option(help="System message, or first lines of prompts.")] = None,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--fewshot-in-one-turn",
            help="Examples as turns of a conversation (default with --chat-template), or in one message.",
            show_default=False,
        ),
    ] = None,
    num_bootstrap: opt.NumBootstrap = _DEFAULT.num_bootstrap,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="TASK=SCORE or TASK:METRIC=SCORE, in the metric's own unit: exit with 1 where it is worse; may be "
            "repeated."
        ),
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
    """Run tasks of lm-evaluation-harness on any model, extension or memory; offline with files of your own.

    Example: longext eval harness MODEL --tasks hellaswag,arc_easy --limit 100

    Own tasks: longext eval harness MODEL --tasks mine --include-path tasks/ --memory OUT@8
    """
    _run(opt.config_with_memory(ctx, HarnessConfig, recipe, settings), as_json)


def _run(config: HarnessConfig, as_json: bool) -> None:
    import time

    from longext.cli.answering import kept_answers
    from longext.cli.models import open_model
    from longext.evals.harness import suite as steps
    from longext.evals.limits import require_bars
    from longext.report.console import progress, stderr
    from longext.report.harness_views import harness_table
    from longext.report.results import output_directory

    steps.check_harness_config(config)
    output = output_directory(config.output, "harness", config.model)
    open_output(output, config)
    if config.include_path is None:
        stderr().print("Searching lm-eval's tasks (seconds) ...")
    tasks = steps.load_harness_tasks(config)
    model = open_model(config)
    started = time.perf_counter()
    folder = steps.partial_folder(output)
    with kept_answers(folder, output, config):
        with progress("lm-eval", tasks.num_documents(config.limit), "documents") as advance:
            scorer = steps.open_scorer(model, config, advance, folder)
            results = steps.run_harness(scorer, tasks, config)
        scores = steps.harness_scores(results, scorer)
        notes = steps.harness_notes(scorer, scores, config)
        record = steps.harness_record(scorer, results, scores, config, notes, time.perf_counter() - started)
        record["bars"] = steps.harness_verdicts(scores, config)
        extra = {"samples.jsonl": steps.sample_lines(results)}
        deliver(
            output,
            _COMMAND,
            config,
            record,
            lambda: [harness_table(opt.titled(config), record)],
            dict,
            as_json=as_json,
            notes=notes,
            extra=extra,
        )
    require_bars(record)
