"""The command line: commands are files in `commands/`, evaluations in `evals/suites/`, imported when they are used."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

import longext
from longext.cli.build import WIDEST, Command, build_command
from longext.cli.errors import flush_output, prepare_streams, reported_errors
from longext.errors import ConfigError
from longext.evals.base import EVALS
from longext.manifest import typed
from longext.processes.launcher import is_main_process
from longext.registry import Registry, did_you_mean
from longext.signals import ending_signals
from longext.staging import release_outputs
from longext.untrusted import take_notes

_TRACEBACK = ("--traceback", "--debug")
_EXPLAIN = ("--explain",)
_HELP = "Extend, train and evaluate long-context Hugging Face checkpoints."
_EVAL_HELP = "Evaluate a model under named protocols"
_ORDER = (
    "extend finetune merge convert export compress-train memory generate chat plan inspect verify serve-config eval "
    "passkey advise search compare report diff recipes doctor"
).split()
COMMANDS: Registry[Command] = Registry("command", "longext.cli.commands", _ORDER)


class _Group(TyperGroup):
    """A group whose commands are built when they are asked for; its help lists their summaries and imports none."""

    def names(self) -> Iterator[str]:
        """Yield the names of the commands in the order of the help."""
        raise NotImplementedError

    def summary(self, name: str) -> str:
        """Return one line on a command (its file is read: not for every command that runs)."""
        raise NotImplementedError

    def build(self, name: str) -> Any:
        """Return the command called `name`."""
        raise NotImplementedError

    def list_commands(self, ctx: Any) -> list[str]:
        """List the commands in the order a user meets them."""
        return list(self.names())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, None if there is none of that name."""
        return self.build(cmd_name) if cmd_name in self.list_commands(ctx) else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name (ConfigError: there is none; names the nearest one)."""
        if args[0] not in self.list_commands(ctx):
            raise ConfigError(f"Unknown command '{args[0]}'. {did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the name and summary of each command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.summary(name)) for name in self.names()])


class _Root(_Group):
    """Runs a command so that whatever goes wrong ends in one line and the right exit code."""

    _shows_traceback = False
    _explains = False

    def names(self) -> Iterator[str]:
        """Yield the commands, and `eval` in its place among them."""
        found = list(COMMANDS)
        yield from (name for name in dict.fromkeys([*_ORDER, *found]) if name == "eval" or name in found)

    def summary(self, name: str) -> str:
        """Return one line on a command."""
        return _EVAL_HELP if name == "eval" else COMMANDS.summary(name)

    def build(self, name: str) -> Any:
        """Return a command, or the group of evaluations."""
        return typer.main.get_command(_evals) if name == "eval" else build_command(name, COMMANDS[name])

    def main(self, args: Sequence[str] | None = None, *more: Any, **settings: Any) -> Any:
        """Run the command line: streams that can be written to, signals that clean up, and one line for any failure."""
        arguments = list(sys.argv[1:] if args is None else args)
        given = without_dash(arguments)
        self._shows_traceback, given = _without(_TRACEBACK, given)
        self._explains, given = _without(_EXPLAIN, given)
        prepare_streams()
        with ending_signals(), typed(arguments):
            try:
                return super().main(given, *more, **settings)
            finally:
                with contextlib.suppress(OSError):
                    flush_output()

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the command line under `reported_errors`."""
        with reported_errors(self._shows_traceback, explain=self._explains):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command under `reported_errors`, and let go of its outputs."""
        take_notes()
        with reported_errors(self._shows_traceback, lambda: ctx.invoked_subcommand, self._explains):
            try:
                result = super().invoke(ctx)
            finally:
                release_outputs()
            for note in take_notes() if is_main_process() else ():
                print(f"longext: note: {note}", file=sys.stderr)
            flush_output()
            return result


class _Evals(_Group):
    """`longext eval`: every registered evaluation, and the comparison of two results."""

    def names(self) -> Iterator[str]:
        """Yield the evaluations."""
        yield from (*EVALS, "diff")

    def summary(self, name: str) -> str:
        """Return one line on an evaluation."""
        return (COMMANDS if name == "diff" else EVALS).summary(name)

    def build(self, name: str) -> Any:
        """Return the command of an evaluation."""
        from longext.cli.evaluation import evaluation_command

        return build_command(f"eval {name}", COMMANDS[name] if name == "diff" else evaluation_command(name))


def without_dash(args: list[str]) -> list[str]:
    """Return a command line with `--json -` and `--json=-` as `--json`.

    An option whose value may be left out would take a MODEL behind it for that value.
    """
    given = ["--json" if arg == "--json=-" else arg for arg in args]
    return [arg for before, arg in zip(["", *given], given, strict=False) if (before, arg) != ("--json", "-")]


def _without(flags: Sequence[str], args: list[str]) -> tuple[bool, list[str]]:
    """Return (whether one of the flags is among the arguments, wherever it stands; the others)."""
    end = args.index("--") if "--" in args else len(args)
    rest = [arg for arg in args[:end] if arg not in flags]
    return len(rest) < end, [*rest, *args[end:]]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longext {longext.__version__}")
        raise typer.Exit


_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": WIDEST}
app = typer.Typer(
    name="longext",
    cls=_Root,
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)
_evals = typer.Typer(
    name="eval", cls=_Evals, help=f"{_EVAL_HELP}.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


@app.callback()
def _root(
    debug: bool = typer.Option(False, *_TRACEBACK, help="Show the traceback of an error; may stand anywhere."),
    explain: bool = typer.Option(
        False, *_EXPLAIN, help="Let a paragraph follow an error that is about lengths, factors or methods."
    ),
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_show_version, is_eager=True),
) -> None:
    """Extend, train and evaluate long-context Hugging Face checkpoints."""


@_evals.callback()
def _eval() -> None:
    """Evaluate a model under named protocols."""
