"""The command line: one file per command; torch is imported only inside the function that runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

import longext
from longext.cli.errors import flush_output, prepare_streams, reported_errors
from longext.cli.options import without_dash
from longext.signals import ending_signals
from longext.staging import release_outputs
from longext.untrusted import take_notes

_TRACEBACK = ("--traceback", "--debug")

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

    _shows_traceback = False

    def list_commands(self, ctx: Any) -> list[str]:
        """List the commands in the order a user meets them."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def main(self, args: Sequence[str] | None = None, *more: Any, **settings: Any) -> Any:
        """Run the command line: streams that can be written to, signals that clean up, and one line for any failure."""
        given = without_dash(list(sys.argv[1:] if args is None else args))
        self._shows_traceback, given = _without_traceback(given)
        prepare_streams()
        with ending_signals():
            try:
                return super().main(given, *more, **settings)
            finally:
                with contextlib.suppress(OSError):
                    flush_output()

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the command line under `reported_errors`."""
        with reported_errors(self._shows_traceback):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command under `reported_errors`, and let go of its outputs."""
        take_notes()
        with reported_errors(self._shows_traceback, lambda: ctx.invoked_subcommand):
            try:
                result = super().invoke(ctx)
            finally:
                release_outputs()
            for note in take_notes():
                print(f"longext: note: {note}", file=sys.stderr)
            flush_output()
            return result


def _without_traceback(args: list[str]) -> tuple[bool, list[str]]:
    """Return (whether --traceback or --debug is among the arguments, wherever it stands; the others)."""
    end = args.index("--") if "--" in args else len(args)
    rest = [arg for arg in args[:end] if arg not in _TRACEBACK]
    return len(rest) < end, [*rest, *args[end:]]


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
    debug: bool = typer.Option(False, *_TRACEBACK, help="Show the traceback of an error; may stand anywhere."),
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
