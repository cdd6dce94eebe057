"""`longext chat` and `longext memory` as a user runs them: scripts of lines, files, a terminal, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from command_line import fails, fails_in_one_line, no_leftovers, ok
from typer.testing import CliRunner

import longext

STORY = "The keeper climbed the stairs every night. " * 16
BUILD = ("memory", "build", "story.txt", "--model", "books-5m", "-o", "a.memory")


@pytest.fixture
def story(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    return "story.txt"


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Run `longext chat` with these lines on standard input: talk(lines, "books-5m", ...) -> result."""
    from longext.cli import app

    monkeypatch.chdir(tmp_path)
    return lambda lines, *args: CliRunner().invoke(app, ["chat", *map(str, args)], input="\n".join(lines))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["thinned:8", "knorm:64"])
def test_a_built_memory_stands_for_its_documents(run, story, tmp_path, spec):
    prompt = ("--prompt", "In the end", "--max-new-tokens", 8)
    built = run(*BUILD, "--memory", spec)
    assert "open turn" in ok(built) and "Wrote a.memory. Next: longext generate --memory a.memory" in built.stdout
    no_leftovers(tmp_path, "a.memory", "story.txt")
    read = ok(run("generate", "books-5m", "--memory", spec, "--context", story, *prompt))
    assert ok(run("generate", "--memory", "a.memory", *prompt)) == read
    assert ok(run("generate", "books-5m", "--memory", "a.memory", *prompt)) == read
    held = json.loads(ok(run("memory", "inspect", "a.memory", "--json")))["memory"]
    assert f"{held['num_slots']:,}" in built.stdout
    assert (held["schema"], held["memory"], held["model"]) == ("longext.memory/3", spec, "books-5m")
    assert held["documents"] == [{"name": "story.txt", "num_tokens": held["num_tokens"]}]
    assert held["num_bytes"] > 0 and held["num_slots"] > 0
    fails_in_one_line(run(*BUILD, "--memory", spec), 2, "a.memory exists already", "--force")
    fails_in_one_line(run("inspect", "a.memory"), 2, "is a memory, not a model: longext memory inspect a.memory says")


def test_several_documents_and_more_later(run, story, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("The sea is deep.")
    args = ("--memory", "knorm:64", "--segment", 32)
    ok(run("memory", "build", story, "more", "--model", "books-5m", *args, "-o", "a.memory"))
    ok(run("memory", "build", story, "--model", "books-5m", *args, "-o", "b.memory"))
    ok(run("memory", "build", "more", "--memory", "b.memory", "-o", "c.memory"))
    ok(run("memory", "build", "more", "--memory", "b.memory", "-o", "c.memory", "--force"))
    both = [json.loads(ok(run("memory", "inspect", name, "--json")))["memory"] for name in ("a.memory", "c.memory")]
    assert [one["name"] for one in both[0]["documents"]] == ["story.txt", "b.txt"]
    assert {**both[0], "file": ""} == {**both[1], "file": ""}
    prompt = ("--prompt", "It", "--max-new-tokens", 6)
    assert ok(run("generate", "--memory", "a.memory", *prompt)) == ok(run("generate", "--memory", "c.memory", *prompt))


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("memory", "look", "a"), ("takes build or inspect",)),
        (("memory", "build", "-o", "b.memory"), ("takes documents",)),
        (("memory", "build", "story.txt"), ("-o corpus.memory",)),
        ((*BUILD[:-1], "b.memory"), ("give --memory", "thinned:8")),
        ((*BUILD[:-1], "b.memory", "--memory", "window"), ("no keys or values",)),
        ((*BUILD[:-1], "b.memory", "--memory", "tova-aware:9"), ("leave -aware out",)),
        ((*BUILD[:-1], "no/b.memory", "--memory", "tova:9"), ("directory that exists",)),
        (("memory", "build", "none.txt", *BUILD[3:], "--memory", "tova:9"), ("No data at 'none.txt'",)),
        (("memory", "inspect", "story.txt"), ("not a memory",)),
        (("memory", "inspect", "none"), ("No memory file none",)),
        (("chat",), ("Missing: model",)),
        (("chat", "books-5m", "--memory", "snapkv-aware:9"), ("leave -aware out",)),
        (("chat", "books-5m", "--when-full", "thin"), ("cannot be thinned",)),
        (("chat", "books-5m", "--context", "none.txt"), ("No text file 'none.txt'",)),
        (("chat", "books-5m", "--chat-template"), ("no chat template",)),
    ],
)
def test_bad_input_ends_in_one_line(run, story, args, texts):
    fails_in_one_line(run(*args), 2, *texts)


# --- chat -------------------------------------------------------------------------------------------------------------


def test_each_line_is_a_turn_and_answers_alone_are_printed(talk, story, tmp_path):
    lines = ["Who climbed?", "", "/context story.txt", "And why?", "/memory", "/save b.memory", "/quit", "never"]
    result = talk(lines, "books-5m", "--memory", "thinned:8", "--max-new-tokens", 9, "--segment", 64)
    again = longext.chat("books-5m", memory="thinned:8", max_new_tokens=9, segment=64, device="cpu")
    first = again.ask("Who climbed?").text
    again.read(STORY)
    assert ok(result) == f"{first.lstrip()}\n{again.ask('And why?').text.lstrip()}\n"
    for text in ("tokens of story.txt read", "[###", "when full: far text is thinned", "Wrote b.memory", "MiB of KV"):
        assert text in result.stderr, text
    back = longext.chat(memory=tmp_path / "b.memory", max_new_tokens=9, device="cpu")
    assert back.ask("Then?").text == again.ask("Then?").text


def test_a_script_stops_at_what_cannot_be_done(talk, story):
    for line, text in (
        ("/contxt a", "No command /contxt"),
        ("/context", "takes a text file"),
        ("/save", "name of a file"),
        ("/save story.txt", "choose another file for /save."),
    ):
        fails(talk([line, "never"], "books-5m"), 2, text)
    result = talk(["//slash", "/reset", "/help"], "books-5m", "--max-new-tokens", 2)
    assert result.exit_code == 0 and "/context FILE" in result.stderr and "Everything is forgotten" in result.stderr


def test_a_remapped_model_talks_beyond_its_window(talk, tmp_path):
    (tmp_path / "long.txt").write_text(STORY * 5)
    args = ("books-5m", "--method", "leaky-rerope", "--factor", 8, "--context", "long.txt", "--max-new-tokens", 3)
    result = talk(["Who?"], *args)
    assert result.exit_code == 0 and "of 4,096 positions" in result.stderr


def wait_for(terminal, text, seconds=120):
    """Read what a terminal shows until it holds `text`."""
    shown, end = "", time.time() + seconds
    while text not in shown:
        assert time.time() < end, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


def test_ctrl_c_stops_an_answer_and_at_the_prompt_it_leaves(tmp_path):
    terminal, side = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "longext",
        "chat",
        "books-5m",
        "--max-new-tokens",
        "100000",
        "--memory",
        "knorm:64",
    ]
    chat = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, cwd=tmp_path, start_new_session=True)
    os.close(side)
    wait_for(terminal, ">>> ")
    os.write(terminal, b"Tell me a story.\n")
    wait_for(terminal, "story.")
    wait_for(terminal, " ")  # the first word of the answer
    chat.send_signal(signal.SIGINT)
    assert "(stopped)]" in wait_for(terminal, ">>> ")
    # Python's input() overlooks a signal between the prompt and the wait for a key: press again, as a user would.
    presses = 0
    while not presses or not select.select([terminal], [], [], 5)[0]:
        assert presses < 12, "Ctrl-C at the prompt does nothing"
        chat.send_signal(signal.SIGINT)
        presses += 1
    assert chat.wait(60) == 130
    os.close(terminal)
