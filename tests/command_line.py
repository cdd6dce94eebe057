"""What tests of commands assert of a run: how it ended, what it printed and what it left on disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from unittest import mock

EXTEND = ("--method", "yarn", "--factor", 8, "-o", "out")


def ok(result):
    """The command succeeded; return its standard output."""
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(result, code, *texts):
    """The command ended with `code` and one line that holds `texts`, no traceback; return that line."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    message = lines[-1] if code == 2 and lines[0].startswith("Usage") else " ".join(lines)
    for text in texts:
        assert text in message, message
    return message


def fails_in_one_line(result, code, *texts):
    """As `fails`, with nothing else on standard error."""
    fails(result, code, *texts)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines


def result_of(directory):
    """Return the record in a directory of results, which is whole."""
    for name in ("result.json", "table.md", "run.json", "recipe.yaml"):
        assert (directory / name).is_file(), name
    return json.loads((directory / "result.json").read_text())


def no_leftovers(tmp_path, *expected):
    """The directory holds `expected` and nothing else, hidden files included."""
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


@contextlib.contextmanager
def another_process(output):
    """Hold the lock on `output` as another process does: through a file that this one's commands did not open."""
    path = output.with_name(f".{output.name}.lock")
    with path.open("w") as file:
        file.write("process 4711 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    path.unlink()


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Let pictures be empty files: drawing takes longer than what is tested."""
    with (
        mock.patch("longext.report.plots.save_png", lambda figure, path: path.touch()),
        mock.patch("longext.report.page._svg", lambda picture, name, size: ""),
    ):
        yield
