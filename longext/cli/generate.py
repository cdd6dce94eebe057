"""`longext generate`: continue a text with a model, or with a compressor that remembers more than its window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from longext.cli import app
from longext.cli import options as opt
from longext.compressor.config import GenerateConfig
from longext.manifest import result_record

if TYPE_CHECKING:
    from longext.compressor.generation import Generated

_DEFAULT = GenerateConfig(model="")


@app.command("generate")
def generate(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Directory of a model or a compressor, Hub id, or books-5m.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue, after the context.")] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Text file to read first, or sample; a compressor says what its memory forgot."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Go on from a memory that --save-memory wrote.")] = None,
    save_memory: Annotated[
        str | None, typer.Option(help="Keep what the context became, as a .safetensors file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = _DEFAULT.max_new_tokens,
    temperature: Annotated[
        float, typer.Option(help="0 takes the best token each time, whatever the checkpoint sets.")
    ] = _DEFAULT.temperature,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = _DEFAULT.top_p,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Put context and prompt as one message through the chat template (default: no, a text goes on).",
            show_default=False,
        ),
    ] = None,
    template_arg: opt.TemplateArg = None,
    strip_thinking: opt.StripThinking = None,
    neutralise_control_tokens: opt.NeutraliseControlTokens = False,
    ratio: Annotated[int | None, typer.Option(help="Compression ratio (default: the first it was trained on).")] = None,
    base: Annotated[str | None, typer.Option(help="The compressor's model, where that has moved.")] = None,
    device: opt.Device = _DEFAULT.device,
    dtype: opt.Dtype = _DEFAULT.dtype,
    attention: opt.Attention = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = _DEFAULT.seed,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the --save-memory file.")] = False,
    as_json: opt.Json = False,
    recipe: opt.Recipe = None,
    settings: opt.Settings = None,
) -> None:
    """Continue a text: a plain model inside its window, a compressor after a context of any length.

    Example: longext generate out/uio --context book.txt --save-memory book.safetensors --prompt "In the end,"
    """
    _run(opt.config_from(ctx, GenerateConfig, recipe, settings), as_json)


def _run(config: GenerateConfig, as_json: bool) -> None:
    import time

    from longext.compressor.generation import open_writer
    from longext.report.console import progress, say, stderr, stdout
    from longext.report.results import dump_json

    writer = open_writer(config)
    started = time.perf_counter()
    with progress("reading", writer.num_unread, "tokens") as advance:
        writer.read(advance)
    seconds = time.perf_counter() - started
    for note in writer.notes:
        say(note, aside=True)
    generated = writer.write((lambda _: None) if as_json else _show)
    if as_json:
        stdout().out(dump_json(_record(config, generated, seconds)), highlight=False)
        return
    typer.echo()
    stderr().print(describe(generated))


def _show(text: str) -> None:
    typer.echo(text, nl=False)


def _record(config: GenerateConfig, generated: Generated, seconds: float) -> dict[str, object]:
    return result_record(
        "generate",
        model=config.model,
        text=generated.text,
        tokens=list(generated.tokens),
        num_thought_tokens=generated.num_thought_tokens,
        num_read=generated.num_read,
        read_seconds=seconds,
        tokens_per_second=generated.tokens_per_second,
        memory=generated.memory,
    )


def describe(generated: Generated) -> str:
    """Return one line: what was read, what it became, how fast the rest was written."""
    from longext.report.views import megabytes

    parts = [f"{generated.num_read:,} tokens read"]
    held = generated.memory
    if held is not None:
        forgotten = f" (the first {held['num_forgotten']:,} tokens forgotten)" if held["num_forgotten"] else ""
        size = f"{held['num_slots']:,} slots, {megabytes(held['num_bytes'])}"
        parts.append(f"memory at {held['ratio']}x: {size}{forgotten}")
    thought = f", {generated.num_thought_tokens:,} of them a thought" if generated.num_thought_tokens else ""
    parts.append(f"{len(generated.tokens):,} written{thought}")
    if generated.tokens_per_second:
        parts[-1] += f" at {generated.tokens_per_second:.1f} tokens/s"
    return "; ".join(parts) + "."
