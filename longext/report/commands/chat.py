"""`longext chat` on a terminal, or as a script of lines: what is typed, what is shown, and how an answer is stopped."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from longext.compressor.writing.conversation import Conversation
from longext.compressor.writing.generation import check_file, fullness_notes, read_context
from longext.compressor.writing.talking import room_of, state_of
from longext.errors import ConfigError, LongextError
from longext.report.console import progress, say
from longext.signals import handling

_PROMPT = ">>> "
_BAR = 30  # characters
_HELP = (
    "/context FILE   read a document (or sample) before the next question",
    "/memory         how full the window is, and what is kept",
    "/reset          forget everything",
    "/save FILE      keep the memory in a file: longext chat --memory FILE goes on from it",
    "/quit           leave (also Ctrl-D; Ctrl-C at the prompt)",
    "Ctrl-C stops an answer. A line that begins with // is a message that begins with /.",
)


class _Stopped(Exception):
    """Ctrl-C while a document was read."""


class Terminal:
    """A conversation on standard input and output; what is no answer goes to standard error.

    Args:
        conversation: to talk in.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._is_terminal = sys.stdin.isatty()
        self._is_stopped = False
        self._told_full: Sequence[str] = ()
        self._commands: dict[str, Callable[[str], None]] = {
            "/context": self._read,
            "/memory": self._show_memory,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def talk(self, documents: Sequence[str] = ()) -> None:
        """Read the documents, then take turns until the input ends or the user leaves.

        Raises:
            LongextError: of a line of a script; on a terminal it is told, and the conversation goes on.
        """
        self._say_notes()
        for name in documents:
            self._read(name)
        if self._is_terminal:
            say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.", aside=True)
        for line in self._lines():
            if line in ("/quit", "/exit"):
                return
            try:
                self._do(line)
            except LongextError as error:
                if not self._is_terminal:
                    raise
                say(f"longext: {' '.join(str(error).split())}", aside=True)

    def _lines(self) -> Iterator[str]:
        """Yield lines that say something."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() history and editing
        while True:
            try:
                line = input(_PROMPT if self._is_terminal else "")
            except EOFError:
                if self._is_terminal:
                    say("", aside=True)
                return
            if line.strip():
                yield line.strip()

    def _do(self, line: str) -> None:
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line[1:] if line.startswith("//") else line)
            return
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise ConfigError(f"No command {name}: {', '.join(self._commands)}, /quit.")
        self._commands[name](argument.strip())

    # --- turns ------------------------------------------------------------------------------------------------------

    def _answer(self, question: str) -> None:
        """Write the answer as it comes; Ctrl-C stops it, and it stays as far as it came."""
        conversation, printer = self._conversation, _Printer(sys.stdout.isatty())
        with self._stoppable():
            for piece in conversation.stream(question, is_stopped=lambda: self._is_stopped):
                printer.write(piece)
            stopped = self._is_stopped
        printer.end()
        answer = conversation.answer
        assert answer is not None
        rate = f" at {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
        thought = f" ({answer.num_thought_tokens:,} of them a thought)" if answer.num_thought_tokens else ""
        ended = " (stopped)" if stopped else ""
        self._say_notes()
        self._aside(f"[{state_of(conversation)}; {len(answer.tokens):,} tokens written{thought}{rate}{ended}]")

    def _read(self, name: str) -> None:
        if not name:
            raise ConfigError("/context takes a text file, or sample.")
        text, conversation = read_context(name), self._conversation
        total = len(conversation.model.encode(text, add_bos=False))

        try:
            with self._stoppable(), progress(f"reading {name}", total, "tokens") as bar:

                def advance(amount: int) -> None:
                    bar(amount)
                    if self._is_stopped:
                        raise _Stopped

                count = conversation.read(text, Path(name).name, advance)
        except _Stopped:
            self._aside(f"Stopped: {name} was left out.")
            return
        self._aside(f"{count:,} tokens of {name} read.")
        self._say_notes()
        self._aside(f"[{state_of(conversation)}]")

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Let Ctrl-C set `_is_stopped`, between two tokens and not within one; a second one ends the command."""
        self._is_stopped = False

        def stop(number: int, frame: object) -> None:
            if self._is_stopped:
                raise KeyboardInterrupt
            self._is_stopped = True

        with handling(stop, (signal.SIGINT,)):
            yield

    # --- commands ---------------------------------------------------------------------------------------------------

    def _show_memory(self, _: str) -> None:
        used, window = self._conversation.text.positions()
        filled = min(_BAR, round(_BAR * used / window))
        say(f"[{'#' * filled}{'.' * (_BAR - filled)}] {state_of(self._conversation)}", aside=True)
        for line in room_of(self._conversation):
            say(line, aside=True)

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._told_full = ()
        self._aside("Everything is forgotten.")

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save takes the name of a file.")
        check_file("file for /save", name, force=False, advice="")
        self._conversation.save(Path(name).expanduser())
        self._aside(f"Wrote {name}. Go on from it: longext chat --memory {name}")

    def _help(self, _: str) -> None:
        for line in _HELP:
            say(line, aside=True)

    # --- what is no answer ------------------------------------------------------------------------------------------

    def _say_notes(self) -> None:
        """Tell what the user has to know, and once that a memory began to make room."""
        full = fullness_notes(self._conversation.text)
        for note in [*self._conversation.take_notes(), *(() if self._told_full else full)]:
            self._aside(note)
        self._told_full = self._told_full or full

    def _aside(self, text: str) -> None:
        say(text, aside=True)


class _Printer:
    """Prints pieces of an answer; on a terminal its lines end between words.

    Args:
        is_terminal: standard output is one.
    """

    def __init__(self, is_terminal: bool) -> None:
        self._width = shutil.get_terminal_size().columns if is_terminal else 0
        self._column, self._word, self._has_begun = 0, "", False

    def write(self, piece: str) -> None:
        """Print what is whole; the space in front of an answer is left out."""
        if not self._has_begun:
            piece = piece.lstrip()
            self._has_begun = bool(piece)
        if not self._width:
            self._out(piece)
            return
        for character in piece:
            if character.isspace():
                self._flush_word()
                self._break(character)
            else:
                self._word += character
                if len(self._word) >= self._width:
                    self._flush_word()
        sys.stdout.flush()

    def end(self) -> None:
        """Print the rest, and end the line."""
        self._flush_word()
        self._out("\n")

    def _flush_word(self) -> None:
        if self._column and self._column + len(self._word) > self._width > 0:
            self._out("\n")
            self._column = 0
        self._out(self._word)
        self._column, self._word = self._column + len(self._word), ""

    def _break(self, space: str) -> None:
        if space == "\n":
            self._column = 0
        elif self._column + 1 >= self._width:
            space, self._column = "\n", 0
        else:
            self._column += 1
        self._out(space)

    def _out(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
