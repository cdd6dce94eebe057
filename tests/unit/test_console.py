"""Progress, rates and durations on the terminal and without one."""

from __future__ import annotations

import io

import pytest
import rich.console

from longext.report import console
from longext.report.console import duration, pace
from longext.report.tables import Table


def test_a_table_is_cut_where_a_terminal_would_wrap_it():
    for width, parts in ((40, 1), (41, 2)):
        table = Table("t", ["x" * 10, "y" * 10, "z" * (width - 30)], [["a", "1", "2"]])
        shown = rich.console.Console(width=width, file=io.StringIO())
        shown.print(table.to_rich())
        assert (table.width, len(table.parts(40))) == (width, parts)
        assert shown.file.getvalue().splitlines()[2].rstrip().endswith("z" * (width - 30))


@pytest.mark.parametrize(
    ("done", "seconds", "text"),
    [
        (0, 15, ""),
        (10, 5, "2 tokens/s, 0:01:35 left"),
        (100, 7200, "0.014 tokens/s, 2:00:00 left"),
        (1, 3600, "0.00028 tokens/s, 8 d 7:00:00 left"),
    ],
)
def test_the_time_left_is_never_guessed_from_nothing(done, seconds, text):
    assert pace(done, 200, "tokens", seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.00036, "0.36 ms"), (4.21, "4.21 s"), (42.4, "42 s"), (59.7, "0:01:00"), (90_061, "1 d 1:01:01")],
)
def test_durations_are_spelled_one_way(seconds, text):
    assert duration(seconds) == text


def test_the_clock_starts_with_the_first_step(monkeypatch, capsys):
    """Loading before it, and the part of a resumed run that was done before, are in neither rate nor time left."""
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with console.progress("finetune m", 1000, "tokens") as advance:
        now[0] += 600  # loading
        advance(500, "resumed")
        assert capsys.readouterr().err == "finetune m: 500/1,000 tokens (50%), resumed\n"
        now[0] += 20
        advance(100, "loss 2.1")
    assert capsys.readouterr().err == "finetune m: 600/1,000 tokens (60%), 5 tokens/s, 0:01:20 left; loss 2.1\n"


def test_a_long_silence_says_what_it_is_at(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PLAIN_SECONDS", 0.0)
    with console.working("loading m") as tell:
        tell("tokenising m: 5 tokens so far")
    assert "tokenising m: 5 tokens so far\n" in capsys.readouterr().err


def test_a_progress_display_prints_names_as_they_are(monkeypatch):
    from rich.console import Console

    file = io.StringIO()
    monkeypatch.setattr(console, "stderr", lambda: Console(file=file, force_terminal=True, width=150, **console._PLAIN))
    with console.progress("merge out[/red]:dog:", 2, "rows") as advance:
        advance(1, "[bold] note [/nothing]")
    assert "merge out[/red]:dog:" in file.getvalue() and "[/nothing]" in file.getvalue()
