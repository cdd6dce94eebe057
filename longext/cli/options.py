"""Options that several commands share, and how typed flags become a config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from longext.errors import ConfigError
from longext.evals.limits import PLACES
from longext.settings import build_config, find_recipe

ConfigT = TypeVar("ConfigT")

Model = Annotated[str | None, typer.Argument(help="Directory, Hub id, or books-5m (bundled).", show_default=False)]
Recipe = Annotated[str | None, typer.Option("--config", "-c", help="Recipe: YAML file or the name of a shipped one.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value, over the recipe; may be repeated.")]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Directory to write.")]
Results = Annotated[
    str | None, typer.Option("--output", "-o", help="Results directory (default: results/<name>-<time>).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that longext wrote before.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps, or map (layers over all GPUs).")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16.")]
Attention = Annotated[str | None, typer.Option(help="transformers attention: sdpa, eager, flash_attention_2, ...")]
Seed = Annotated[int, typer.Option(help="Seed of prompts and bootstrap.")]
Data = Annotated[
    str, typer.Option(help="Text file, folder, .jsonl, .parquet, Hub dataset id, or sample (bundled story).")
]
TrainingData = Annotated[
    str,
    typer.Option(help="Required: text file, folder, .jsonl, .parquet, Hub dataset id, or sample.", show_default=False),
]
TextField = Annotated[str, typer.Option(help="Column of the text in jsonl, parquet and Hub data.")]
Split = Annotated[str, typer.Option(help="Split of a Hub dataset.")]
ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Ask through the tokenizer's chat template (default: where it has one).",
        show_default=False,
    ),
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg", help="key=value for the chat template, e.g. enable_thinking=false; may be repeated."
    ),
]
StripThinking = Annotated[
    bool | None,
    typer.Option(
        "--strip-thinking/--no-strip-thinking",
        help="Take a leading thought off answers (default: if the tokenizer knows marks of thoughts).",
        show_default=False,
    ),
]
NeutraliseControlTokens = Annotated[
    bool,
    typer.Option(
        "--neutralise-control-tokens", help="Write control tokens that a text spells with a space, so as text."
    ),
]
MaxDocuments = Annotated[int | None, typer.Option(min=1, help="Read at most this many documents.")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Cut each document to this many tokens.")]
Lengths = Annotated[str, typer.Option(help="Context lengths in tokens, comma-separated.")]
Depths = Annotated[str, typer.Option(help="Needle depths from 0 (start) to 1 (end), comma-separated.")]
Stride = Annotated[
    int | None,
    typer.Option(help="Tokens the window moves (sliding, longlora; default: 256, at most half of a short window)."),
]
Method = Annotated[
    str | None, typer.Option(help="Apply this extension method in memory first; parameters as name:key=value.")
]
Factor = Annotated[float | None, typer.Option(help="Factor of --method: target length / trained length.")]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens per forward pass (default: one window on a CPU, 32768 on a GPU).")
]
NumTrials = Annotated[int, typer.Option(help="Prompts per length and depth.")]
NumBuckets = Annotated[int, typer.Option(help="Position buckets (positional).")]
NumBootstrap = Annotated[int, typer.Option(min=0, help="Bootstrap samples for the interval.")]
FailUnder = Annotated[
    list[str] | None,
    typer.Option(help=f"{PLACES}, a share of 0 to 1 (0.9 for 90%): exit with 1 below it; may be repeated."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Read by segments with this memory: none, window[:N], streaming:4+N, transformer-xl:N, or a trained "
        "compressor OUT[@ratio[+overlap]] (MODEL may then be left out)."
    ),
]
SegmentLength = Annotated[
    int, typer.Option("--segment", help="Tokens of a segment (--memory; compressors: their own).")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code from the checkpoint.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON on standard output, and no table; also spelled `--json -`."),
]

_RECIPE_HEADER = re.compile(r"# longext ([a-z]+(?:[ -][a-z]+)*) -c ")
_TAKES_RECIPES_OF = {"inspect": "extend"}  # inspect shows what an extension would do
_NOT_CONFIG = {"recipe", "settings", "as_json", "dry_run", "verify"}


def without_dash(args: list[str]) -> list[str]:
    """Return a command line with `--json -` and `--json=-` as `--json`.

    An option whose value may be left out would take a MODEL behind it for that value.
    """
    given = ["--json" if arg == "--json=-" else arg for arg in args]
    return [arg for before, arg in zip(["", *given], given, strict=False) if (before, arg) != ("--json", "-")]


def typed_flags(ctx: typer.Context) -> dict[str, Any]:
    """Return the parameters the user typed (or set by environment), not those left at their default."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {
        name: ctx.params[name]
        for name, source in sources.items()
        if name not in _NOT_CONFIG and source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")
    }


def config_from(
    ctx: typer.Context,
    kind: type[ConfigT],
    recipe: str | None,
    settings: list[str] | None,
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Return the command's config: defaults < recipe < --set < typed flags."""
    path = find_recipe(recipe) if recipe else None
    if path is not None:
        _check_command(path, ctx)
    return build_config(kind, path, settings or [], typed_flags(ctx), defaults)


def _check_command(recipe: Path, ctx: typer.Context) -> None:
    """Refuse a recipe whose first line says that it is for another command (keys alone do not tell: many are shared).

    Shipped recipes and every output's recipe.yaml begin with `# longext COMMAND -c ...`.
    """
    with recipe.open(encoding="utf-8", errors="replace") as file:
        first = _RECIPE_HEADER.match(file.readline(200))
    # the outermost name is that of the program
    command = " ".join(ctx.command_path.split()[1:])
    if first and first[1] not in (command, _TAKES_RECIPES_OF.get(command)):
        raise ConfigError(
            f"{recipe} is a recipe of `longext {first[1]}`, not of `longext {command}`. Give one of this command's, or "
            "change the recipe's first line."
        )


def config_with_memory(
    ctx: typer.Context, kind: type[ConfigT], recipe: str | None, settings: list[str] | None, **defaults: Any
) -> ConfigT:
    """Return `config_from`; where it names a `memory`, `defaults` go under it, and a compressor's model and segment."""
    config: Any = config_from(ctx, kind, recipe, settings, {"model": ""})
    if config.memory is None:
        return config_from(ctx, kind, recipe, settings)
    from longext.compressor.reading.readers import memory_defaults

    return config_from(ctx, kind, recipe, settings, {**defaults, **memory_defaults(config.memory)})


def titled(config: Any) -> str:
    """Return what is measured, for titles: the model, the method applied to it, the memory it reads with."""
    from longext.report.tables import named

    factor = f" {config.factor:g}x" if config.factor else ""
    method = f" + {config.method}{factor}" if config.method else ""
    memory = f" + {Path(config.memory).name}" if config.memory else ""
    return f"{named(config.model)}{method}{memory}"


def join(values: tuple[Any, ...]) -> str:
    """Return a tuple default as the comma-separated text a flag takes."""
    return ",".join(str(value) for value in values)
