"""The command line: one file per command; torch is imported only inside the function that runs."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

import longext
from longext.cli.errors import reported_errors
from longext.cli.options import without_dash

_ORDER = (
    "extend",
    "finetune",
    "merge",
    "convert",
    "compress-train",
    "generate",
    "plan",
    "inspect",
    "verify",
    "eval",
    "passkey",
    "compare",
    "report",
)


class _Group(TyperGroup):
    """Runs a command so that whatever goes wrong ends in one line and the right exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the commands in the order a user meets them."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line; `--json -` is `--json`."""
        return super().parse_args(ctx, without_dash(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command under `reported_errors`."""
        with reported_errors(bool(ctx.params.get("debug")), lambda: ctx.invoked_subcommand):
            return super().invoke(ctx)


app = typer.Typer(
    name="longext",
    cls=_Group,
    help="Extend, train and evaluate long-context Hugging Face checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longext {longext.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_show_version, is_eager=True),
) -> None:
    """Extend, train and evaluate long-context Hugging Face checkpoints."""


from longext.cli import (  # noqa: E402, F401
    babilong,
    compare,
    compress,
    convert,
    diff,
    effective,
    efficiency,
    evaluate,
    extend,
    finetune,
    generate,
    harness,
    inspect,
    longbench,
    longeval,
    merge,
    needle,
    passkey,
    plan,
    reconstruction,
    report,
    short,
    verify,
)
