"""Turn every failure into one clear line and an exit code.

2 for a user's mistake, 1 for a failed run, 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator

import typer

from longext.errors import LAUNCHED_BY_US, LongextError, TrainingStopped

_INTERRUPTED = 130  # 128 + SIGINT, what a shell expects
_OUT_OF_MEMORY = (
    "out of memory. Lower --batch-tokens or the largest length, use --dtype bfloat16, or a device with more memory."
)
_OUT_OF_MEMORY_IN_TRAINING = (
    "out of memory. Ask `longext plan MODEL --length N` what fits; then lower --batch-size or --target-length, keep "
    "activation checkpointing on, add --offload (CUDA), --quantize nf4 or --sequence-parallel, or lower "
    "--set loss_chunk=1024. Go on from the last checkpoint, if there is one, with --resume."
)
_OUT_OF_MEMORY_WITH_MEMORIES = (
    "out of memory. Lower --batch-size, --segment or --set loss_chunk=1024, use --dtype bfloat16 and --gradient exact "
    "(one segment's graph at a time), keep activation checkpointing on, or add --set offload=true (CUDA) or "
    "--sequence-parallel. Go on from the last checkpoint, if there is one, with --resume."
)
_OUT_OF_MEMORY_OF = {"finetune": _OUT_OF_MEMORY_IN_TRAINING, "compress-train": _OUT_OF_MEMORY_WITH_MEMORIES}


@contextlib.contextmanager
def reported_errors(debug: bool, command: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Run a command; print what went wrong in one line on standard error and exit.

    Args:
        debug: show the traceback.
        command: returns the name of the command that ran.
    """
    try:
        yield
    except (LongextError, OSError, MemoryError, RuntimeError, ImportError, KeyboardInterrupt) as error:
        explained = _explain(error, command() or "")
        if explained is None or debug:
            raise
        message, code = explained
        if isinstance(error, TrainingStopped) and LAUNCHED_BY_US in os.environ:
            code = 0  # the launcher turns the signal into the exit code
        if not isinstance(error, TrainingStopped) or os.environ.get("RANK", "0") == "0":
            print(f"longext: {message}", file=sys.stderr)
        raise typer.Exit(code) from None


def _explain(error: BaseException, command: str) -> tuple[str, int] | None:
    """Return (one line, exit code) for a failure a user can act on, None for a bug of ours."""
    if isinstance(error, LongextError):
        return " ".join(str(error).split()), error.exit_code
    if _is_interrupt(error):
        return "interrupted; nothing unfinished was left under an output name.", _INTERRUPTED
    if isinstance(error, MemoryError) or _is_torch_memory(error):
        return _OUT_OF_MEMORY_OF.get(command, _OUT_OF_MEMORY), 1
    if isinstance(error, OSError):
        return _explain_os(error)
    return None


def _is_interrupt(error: BaseException | None) -> bool:
    """True for Ctrl-C, and for the ImportError that transformers makes of one that meets its lazy imports."""
    while isinstance(error, ImportError):
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


def _is_torch_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _explain_os(error: OSError) -> tuple[str, int] | None:
    where = f" ({error.filename2 or error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{where}; nothing was written. Free some, or choose another -o.", 1
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"no permission to read or write{where}: {error.strerror}. Choose another -o, or change the permissions.",
            1,
        )
    return (f"{error.strerror or error}{where}.", 1) if error.errno else None
