"""Turn every failure into one clear line and an exit code.

2 for a user's mistake, 1 for a failed run, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

import longext
from longext.concepts import explanation
from longext.errors import LongextError, TrainingStopped
from longext.extras import explain_import
from longext.processes.launcher import is_launched, may_report
from longext.signals import received

_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left on the disk (quota)",
    errno.EFBIG: "no space left for so large a file (ulimit -f, or the file system's limit)",
}
_LONGEST = 300  # characters of an unforeseen message
_PARAGRAPH = 80  # characters of a line of an explanation
_OUT_OF_MEMORY = (
    "out of memory. Lower --batch-tokens or the largest length, use --dtype bfloat16, or a device with more memory."
)
_OUT_OF_MEMORY_IN_TRAINING = (
    "out of memory. Ask `longext plan MODEL --length N` what fits; then lower --batch-size or --target-length, keep "
    "activation checkpointing on, add --sweep auto (one part of a row at a time), --tile 2048, --offload (CUDA), "
    "--quantize nf4 or --sequence-parallel, or lower --set loss_chunk=1024. Go on from the last checkpoint, if there "
    "is one, with --resume."
)
_OUT_OF_MEMORY_WITH_MEMORIES = (
    "out of memory. Lower --batch-size, --segment or --set loss_chunk=1024, use --dtype bfloat16 and --gradient exact "
    "(one segment's graph at a time), keep activation checkpointing on, or add --set offload=true (CUDA) or "
    "--sequence-parallel. Go on from the last checkpoint, if there is one, with --resume."
)
_LOST_PROCESS = (
    "another process of this run ended, or did not answer within collective_timeout seconds (--set). Look at what it "
    "printed; go on from the last checkpoint, if there is one, with --resume."
)
_LOST_SHARER = (
    "another process of this run ended. Look at what it printed; the same command goes on from the answers so far."
)
_LOST = ("closed by peer", "reset by peer", "Timed out waiting", "Socket Timeout", "Broken pipe")  # gloo's words
_OUT_OF_MEMORY_OF = {"finetune": _OUT_OF_MEMORY_IN_TRAINING, "compress-train": _OUT_OF_MEMORY_WITH_MEMORIES}


@contextlib.contextmanager
def reported_errors(
    show_traceback: bool, command: Callable[[], str | None] = lambda: None, explain: bool = False
) -> Iterator[None]:
    """Run a command; print what went wrong in one line on standard error and exit.

    Args:
        show_traceback: let the exception through.
        command: returns the name of the command that ran.
        explain: let a paragraph on what an error is about follow (`--explain`, or LONGEXT_EXPLAIN=1).
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.TyperException):
        raise  # typer's own: wrong usage, and the ends of commands
    except BaseException as error:
        if show_traceback or not _is_explained(error):
            raise
        if isinstance(error, BrokenPipeError) and _is_output_gone():
            raise typer.Exit(1) from None
        message, code = _explain(error, command() or "")
        message = _visible(message)
        if may_report(message, code, getattr(error, "everywhere", False)):
            print(f"longext: {message}", file=sys.stderr)
            paragraph = explanation(getattr(error, "concept", ""))
            if paragraph and (explain or os.environ.get("LONGEXT_EXPLAIN", "0") not in ("", "0")):
                print(f"\n{textwrap.fill(paragraph, _PARAGRAPH, break_on_hyphens=False)}", file=sys.stderr)
        raise typer.Exit(code) from None


def _visible(message: str) -> str:
    """Return a message without the control characters that a name in it may hold."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", message)


def _is_explained(error: BaseException) -> bool:
    """False for what is no failure of the command: SystemExit, and what a test or a debugger throws."""
    return isinstance(error, (Exception, KeyboardInterrupt)) or type(error).__name__ == "PanicException"


def _explain(error: BaseException, command: str) -> tuple[str, int]:
    """Return (one line, exit code) for a failure."""
    if isinstance(error, TrainingStopped):
        return " ".join(str(error).split()), error.exit_code
    if _is_interrupt(error) or received() is not None:
        number = received() or signal.SIGINT
        how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        return f"{how}; nothing unfinished was left under an output name.", 128 + number
    if isinstance(error, LongextError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, MemoryError) or _is_torch_memory(error):
        return _OUT_OF_MEMORY_OF.get(command, _OUT_OF_MEMORY), 1
    if is_launched() and _is_lost_process(error):
        return _LOST_PROCESS if command in _OUT_OF_MEMORY_OF else _LOST_SHARER, 1
    absent = explain_import(error, f"`longext {command}`" if command else "longext")
    return (str(absent), absent.exit_code) if absent else _explain_os(error) or _explain_bug(error)


def _is_interrupt(error: BaseException | None) -> bool:
    """True for Ctrl-C, and for the ImportError that transformers makes of one that meets its lazy imports."""
    while isinstance(error, ImportError):
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


def _is_lost_process(error: BaseException) -> bool:
    """True where torch.distributed could not reach another process: NCCL and the store have classes, gloo has words."""
    is_named = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return is_named or (isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST))


def _is_torch_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _explain_os(error: BaseException) -> tuple[str, int] | None:
    """Return (one line, 1) for an error of the operating system, also one that a native writer reports as its own."""
    number = error_number(error)
    names = [error.filename2, error.filename] if isinstance(error, OSError) else []
    where = next((f" ({name})" for name in names if name is not None), "")
    if number in _FULL:
        what = f"{_FULL[number]}{where}; nothing unfinished was left under an output name"
        return f"{what}. Free some space, or choose another -o.", 1
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "Choose another -o, or change the permissions."
        return f"no permission to read or write{where}: {os.strerror(number)}. {advice}", 1
    return (f"{os.strerror(number)}{where}.", 1) if number else None


def error_number(error: BaseException) -> int | None:
    """Return the errno of an OSError, or of the one behind an error of safetensors' or torch's writer; else None."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))  # how Rust spells one
    if told and type(error).__name__ in ("SafetensorError", "PanicException", "Exception"):
        return int(told[1])
    # torch.save says neither the file nor the reason when a write fails
    failed = re.search(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos", str(error))
    return errno.ENOSPC if failed else None


def _explain_bug(error: BaseException) -> tuple[str, int]:
    """Return (one line, 1) for what nobody foresaw: the exception and the last place in longext that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(longext.__file__).parent
    ours = [frame for frame in frames if package in Path(frame.filename).parents]
    place = ""
    if ours or frames:
        frame = (ours or frames)[-1]
        path = Path(frame.filename)
        name = path.relative_to(package.parent) if package in path.parents else path.name
        place = f" ({name}:{frame.lineno})"
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    told = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"internal error: {told}{place}. Run it with --traceback and please report what it prints.", 1


def prepare_streams() -> None:
    """Make standard streams that printing cannot fail on: closed ones go nowhere, names that are not text are escaped.

    Without it the first file that a command opens would take the number of a closed stream.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Write out what is still buffered, while an error can still be told."""
    try:
        sys.stdout.flush()
    except OSError:
        _leave_standard_output()
        raise


def _is_output_gone() -> bool:
    """True if it is standard output that nobody reads any more (`| head`): then nobody is there to be told."""
    try:
        flush_output()
    except OSError:
        return True
    return False


def _leave_standard_output() -> None:
    """Let nothing more go to a standard output that is gone: Python would complain at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
