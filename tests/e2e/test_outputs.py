"""One door for outputs: what may be written, by whom, and what is left when it ends early."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import EXTEND, another_process, fails, no_leftovers, ok

from longext import staging
from longext.staging import OutputTaken, staged_directory

WRITE = "longext.conversion.extend.write_manifest"
SHORT = ("--lengths", 64, "--stride", 32, "--max-tokens", 64, "--num-bootstrap", 0)
PPL = ("eval", "ppl", "books-5m", *SHORT, "-o", "out")
COMMANDS = {
    "extend": ("extend", "books-5m", *EXTEND),
    "merge": ("merge", "nowhere", "-o", "out"),
    "ppl": PPL,
    "passkey": ("passkey", "books-5m", "--lengths", 128, "--num-trials", 1, "--depths", 0, "-o", "out"),
    "plan": ("plan", "books-5m", "--length", 1024, "-o", "out"),
    "inspect": ("inspect", "books-5m", "-o", "out"),
    "finetune": ("finetune", "books-5m", "--data", "sample", "--target-length", 64, "--num-steps", 1, "-o", "out"),
}


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def make(kind, path):
    """Put something that is no directory at `path`; devices are copies, made as root."""
    if kind == "file":
        path.write_text("mine")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "link":
        path.symlink_to("nowhere")
    elif os.geteuid() != 0:
        pytest.skip("devices are made by root")
    else:
        number = os.makedev(1, 3) if kind == "character" else os.makedev(7, 200)
        os.mknod(path, 0o600 | (stat.S_IFCHR if kind == "character" else stat.S_IFBLK), number)


@pytest.mark.parametrize("kind", ["file", "FIFO", "socket", "link", "character", "block"])
def test_what_is_no_directory_is_refused_and_left_alone(run, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make(kind, Path("out"))
    before = os.lstat("out")
    for command in ("extend", "ppl", "finetune"):
        for extra in ((), ("--force",)):
            fails(run(*COMMANDS[command], *extra), 2, "out", "-o")
    fails(run("extend", "books-5m", "--method", "yarn", "--factor", 8, "-o", "out/below"), 2, "-o")
    assert (os.lstat("out").st_ino, os.lstat("out").st_mode) == (before.st_ino, before.st_mode)
    no_leftovers(tmp_path, "out")


def test_a_link_to_a_directory_stays_and_its_target_is_written(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    ok(run(*COMMANDS["extend"]))
    fails(run(*COMMANDS["extend"]), 2, "already exists")
    ok(run(*COMMANDS["extend"], "--force"))
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/config.json").is_file()
    no_leftovers(tmp_path, "disk", "out")


def test_a_mount_point_is_refused_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("/out"))
    fails(run(*COMMANDS["ppl"]), 2, "mount point", "-o out/NAME")
    monkeypatch.setattr(os.path, "ismount", lambda path: False)  # as for a bind mount of the same file system
    if Path("/proc/self/mountinfo").exists():
        assert staging._is_mount(Path("/proc"))
    fails(run("eval", "ppl", "books-5m", *SHORT, "-o", "."), 2, "current directory")


def test_an_output_never_takes_what_is_read_with_it(run, base, tmp_path):  # noqa: F811
    ok(run(*COMMANDS["extend"]))
    (tmp_path / "alias").symlink_to("out")
    (tmp_path / "text.txt").write_text("He went away. " * 40)
    fails(run("extend", "out", "--method", "yarn", "--factor", 16, "-o", "alias", "--force"), 2, "overlap")
    fails(run("eval", "ppl", "out", *SHORT, "-o", "alias", "--force"), 2, "which this command reads")
    fails(run("eval", "ppl", "alias", *SHORT, "-o", "out", "--force"), 2, "which this command reads")
    for reader in (("eval", "short", "books-5m", "--against"), ("gate", "books-5m", "--baseline")):
        fails(run(*reader, "out", "-o", "alias", "--force"), 2, "which this command reads")
    fails(run("eval", "longppl", "books-5m", "--evaluator", "out", "-o", "out", "--force"), 2, "this command reads")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_of_two_commands_is_refused_at_once(run, tmp_path, name):
    with another_process(tmp_path / "out"):
        fails(run(*COMMANDS[name]), 2, "out is in use", "process 4711 on elsewhere")
        fails(run(*COMMANDS[name], "--force"), 2, "out is in use")
        (tmp_path / "alias").symlink_to(tmp_path / "out")
    no_leftovers(tmp_path, "alias")


@pytest.mark.parametrize("name", ["n" * 250, "/proc/x", "", "/", ".."])
def test_places_where_no_directory_can_be_made_are_refused(run, tmp_path, name):
    fails(run("extend", "books-5m", "--method", "yarn", "--factor", 8, "-o", name), 2, "-o")
    no_leftovers(tmp_path)


def test_a_recipe_with_a_nul_byte_in_its_output_is_refused(run, tmp_path):
    (tmp_path / "r.yaml").write_text('model: books-5m\nmethod: yarn\nfactor: 8\noutput: "a\\0b"\n')
    fails(run("extend", "-c", "r.yaml"), 2, "NUL character")


def test_a_stale_lock_does_no_harm(run, tmp_path):
    (tmp_path / ".out.lock").write_text("process 1 on nowhere")
    ok(run(*COMMANDS["extend"]))
    no_leftovers(tmp_path, "out")
    make("FIFO", tmp_path / ".out.lock")
    fails(run(*COMMANDS["extend"], "--force"), 2, ".out.lock")


def appear(monkeypatch, target, make):
    """Let `make` run while the command named by `target` writes."""
    module, _, name = target.rpartition(".")
    real = getattr(sys.modules[module], name)

    def write(*args, **kwargs):
        make()
        return real(*args, **kwargs)

    monkeypatch.setattr(target, write)


@pytest.mark.parametrize("filled", [True, False])
def test_what_appears_meanwhile_is_left_alone(run, tmp_path, monkeypatch, filled):
    def make():
        (tmp_path / "out").mkdir()
        if filled:
            (tmp_path / "out/precious").write_text("x")

    appear(monkeypatch, WRITE, make)
    fails(run(*COMMANDS["extend"]), 1, "out was made or changed", "left alone")
    assert names("out") == ["precious"] * filled
    no_leftovers(tmp_path, "out")


def test_an_evaluation_whose_name_was_taken_is_kept_under_another(run, tmp_path, monkeypatch):
    import longext.report.results  # noqa: F401

    appear(monkeypatch, "longext.report.results.write_manifest", lambda: (tmp_path / "out").mkdir())
    message = fails(run(*PPL), 1, "left alone", "What was to be there is in")
    kept = next(tmp_path.glob("out.kept-*"))
    assert str(kept) in message and (kept / "result.json").is_file()


def test_force_replaces_only_what_was_checked(run, tmp_path, monkeypatch):
    ok(run(*COMMANDS["extend"]))

    def swap():
        (tmp_path / "out").rename(tmp_path / "mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/precious").write_text("x")

    appear(monkeypatch, WRITE, swap)
    fails(run(*COMMANDS["extend"], "--force"), 1, "left alone")
    assert names("out") == ["precious"]
    no_leftovers(tmp_path, "mine", "out")


def test_an_empty_directory_that_is_filled_meanwhile_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputTaken), staged_directory(tmp_path / "out", force=True):
        (tmp_path / "out/precious").write_text("x")
    assert names(tmp_path / "out") == ["precious"]


def test_the_next_command_sweeps_what_dead_ones_left(run, tmp_path):
    ours, theirs = staging._machine(), "0" * 12
    dead, old, far, far_old = (
        tmp_path / name
        for name in (
            f".out.partial-{ours}-abcdefgh",
            f".out.old-{ours}-abcdefgh",
            f".out.partial-{theirs}-abcdefgh",
            f".out.partial-{theirs}-bcdefghi",
        )
    )
    other = tmp_path / f".out.x.partial-{ours}-abcdefgh"  # of another output
    for folder in (dead, old, far, far_old, other):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    past = time.time() - 2 * 86400
    for path in (far_old / "file", far_old):
        os.utime(path, (past, past))
    fails(run(*COMMANDS["extend"]), 2, "already exists")  # the old output, set aside when a replacement was killed
    assert (tmp_path / "out/file").read_text() == old.name
    no_leftovers(tmp_path, "out", far.name, other.name)


SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("swallowed", [False, True])
def test_signals_end_a_command_cleanly(run, tmp_path, monkeypatch, number, swallowed):
    def receive():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if not swallowed:
                raise

    appear(monkeypatch, WRITE, receive)
    before = signal.getsignal(number)
    fails(run(*COMMANDS["extend"]), 128 + number, SIGNALS[number], "nothing unfinished")
    no_leftovers(tmp_path)
    assert signal.getsignal(number) is before


def test_the_exit_code_is_the_signals_own(tmp_path):
    """Python under -m ends by SIGINT where a KeyboardInterrupt has left exec("..."), as many libraries use it."""
    (tmp_path / "ends.py").write_text(
        "import os, signal, sys\nfrom longext.signals import ending_signals\n"
        "with ending_signals():\n"
        "    try:\n        exec('os.kill(os.getpid(), signal.SIGTERM)')\n    except KeyboardInterrupt:\n        pass\n"
        "sys.exit(143)\n"
    )
    assert subprocess.run([sys.executable, "-m", "ends"], cwd=tmp_path, check=False).returncode == 143


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(run, tmp_path, monkeypatch):
    appear(monkeypatch, WRITE, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ok(run(*COMMANDS["extend"]))
    finally:
        signal.signal(signal.SIGHUP, before)


# --- results before pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["draw._lines", "layout.shown_tables", "plots.save_png"])
def test_a_picture_that_fails_is_a_line(run, tmp_path, monkeypatch, broken):
    def explode(*_args, **_keys):
        raise ValueError("no such\nfont")

    monkeypatch.setattr(f"longext.report.{broken}", explode)
    result = run(*PPL)
    ok(result)
    assert len([line for line in result.stderr.splitlines() if "tokens to read" not in line]) == 1
    assert "not made: " in result.stderr and "(ValueError: no such font)" in result.stderr
    assert json.loads((tmp_path / "out/result.json").read_text())["results"]
    pictures = ["ppl.png"] if broken == "layout.shown_tables" else []
    assert (tmp_path / "out/run.json").is_file() and ("ppl.png" in names("out")) == bool(pictures)


def test_results_are_there_before_the_first_picture(run, tmp_path, monkeypatch):
    seen = []

    def look(*_args, **_keys):
        seen.extend(path.name for path in tmp_path.glob(".out.partial-*/*"))
        raise RuntimeError

    monkeypatch.setattr("longext.report.draw._lines", look)
    ok(run(*PPL))
    assert {"result.json", "run.json", "recipe.yaml"} <= set(seen)


@pytest.mark.parametrize("name", ["$x$", "a$b$c^{", "[/red]", ":dog:"])
def test_names_are_drawn_and_printed_as_they_are(run, tmp_path, name):
    (tmp_path / name.replace("/", "")).symlink_to(Path(staging.__file__).parent / "assets/books-5m")
    args = ("eval", "ppl", name.replace("/", ""), *SHORT, "-o", "out")
    text = ok(run(*args))
    assert "not made" not in text and name.replace("/", "") in text
    assert (tmp_path / "out/ppl.png").stat().st_size > 1000


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_nobody_foresaw_is_one_line(run, monkeypatch):
    def explode(*_args, **_keys):
        raise TypeError("'<' not supported\nbetween " + "x" * 1000)

    monkeypatch.setattr(WRITE, explode)
    message = fails(run(*COMMANDS["extend"]), 1, "internal error: TypeError: '<' not supported between x")
    assert "(longext/conversion/extend.py:" in message and "--traceback" in message and len(message) < 500
    for args in (("--traceback", *COMMANDS["extend"]), (*COMMANDS["extend"], "--debug")):
        assert isinstance(run(*args).exception, TypeError)


def test_a_full_disk_under_a_native_writer_is_the_disk(tmp_path):
    """safetensors and torch report it as errors of their own."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from longext.cli.errors import _explain

    tensors = {"x": torch.zeros(2**20)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    errors = []
    try:
        for save in (lambda: save_file(tensors, tmp_path / "a"), lambda: torch.save(tensors, tmp_path / "b")):
            try:
                save()
            except Exception as error:
                errors.append(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(errors) == 2 and isinstance(errors[0], SafetensorError)
    for error in (*errors, OSError(errno.ENOSPC, "No space left on device")):
        message, code = _explain(error, "finetune")
        assert code == 1 and message.startswith("no space left"), message


def longext(tmp_path, *args, **keys):
    command = [sys.executable, "-m", "longext", *args]
    return subprocess.run(command, cwd=tmp_path, capture_output="stdout" not in keys, timeout=600, check=False, **keys)


def test_a_closed_standard_output_is_no_traceback(tmp_path):
    words = [str(word) for word in COMMANDS["extend"]]
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys; os.close(1); os.execv(sys.argv[1], sys.argv[1:])"]
        + [sys.executable, "-m", "longext", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "out/config.json").is_file()
    reader, writer = os.pipe()
    os.close(reader)
    done = longext(tmp_path, "plan", "books-5m", "--length", "1024", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    no_leftovers(tmp_path, "out")


def test_names_that_are_not_text_are_printed(tmp_path):
    words = [os.fsencode(str(word)) for word in COMMANDS["extend"][:-1]]
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"longext", *words, b"o\xff"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Wrote o\\udcff." in done.stdout
    manifest = json.loads((Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff")) / "run.json").read_text())
    assert os.fsencode(manifest["config"]["output"]) == b"o\xff"


# --- links ----------------------------------------------------------------------------------------------------------


def test_links_out_of_the_model_are_named_and_left_out(run, base, tmp_path):  # noqa: F811
    (tmp_path / "secret").write_text('{"password": 1}')
    (base / "notes.json").symlink_to("../secret")
    (base / "same.json").symlink_to("generation_config.json")
    text = ok(run("extend", base, *EXTEND))
    assert "notes.json -> ../secret" in text and "same.json" not in text
    assert not (tmp_path / "out/notes.json").exists() and (tmp_path / "out/same.json").is_file()


def test_links_of_a_hub_cache_are_followed(run, base, tmp_path):  # noqa: F811
    snapshot, blobs = tmp_path / "models--a--b/snapshots/c0ffee", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    text = ok(run("extend", snapshot, *EXTEND))
    assert "Left out" not in text
    assert {file.name for file in snapshot.iterdir()} <= {file.name for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("same_time", [False, True])
def test_verify_sees_a_write_through_a_hard_link(run, base, tmp_path, same_time):  # noqa: F811
    ok(run("extend", base, *EXTEND))
    ok(run("verify", "out", "--no-logits"))
    weights = base / "model.safetensors"
    before, size = weights.stat(), weights.stat().st_size
    with weights.open("r+b") as file:  # in place, as some savers do
        for start in [size // 2 + 1] if not same_time else range(size // 2, size, 1000):
            file.seek(start)
            file.write(b"\1\2\3")
    if same_time:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    fails(run("verify", "out", "--no-logits"), 1, "model.safetensors was written to", "hard link")


# --- kills ----------------------------------------------------------------------------------------------------------


COMPLETE = {
    "extend": {"config.json", "model.safetensors", "run.json", "README.md"},
    "merge": {"config.json", "model.safetensors", "run.json", "README.md"},
    "ppl": {"result.json", "table.md", "ppl.png", "run.json"},
    "compare": {"result.json", "table.md", "report.html", "results.csv", "run.json"},
}


def kill_at_random(tmp_path, commands, seconds, count, seed):
    """Start commands and end each by a signal at a random moment; under its final name an output is complete or old."""
    chance = random.Random(seed)
    numbers = [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGINT]
    for i in range(count):
        name = list(commands)[i % len(commands)]
        number = numbers[i // len(commands) % len(numbers)]
        words = [sys.executable, "-m", "longext", *map(str, commands[name])]
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        moment = chance.uniform(0.1, 1.0) * seconds[name]
        time.sleep(moment)
        process.send_signal(number)
        errors = process.communicate(timeout=600)[1].decode()
        output = tmp_path / words[words.index("-o") + 1]
        found = names(output) if output.exists() else []
        print(f"{name:8} {number.name:8} after {moment:5.2f} s: code {process.returncode:4}, {len(found)} files")
        assert process.returncode in (0, -number, 128 + number), (name, number, errors)
        assert "Exception ignored" not in errors and (process.returncode < 0 or "Traceback" not in errors), errors
        assert not found or COMPLETE[name] <= set(found), (name, found)


def test_killed_commands_leave_nothing_half_written(run, tmp_path):
    commands = {"extend": (*COMMANDS["extend"], "--copy", "--force")}
    kill_at_random(tmp_path, commands, {"extend": 0.7}, 6, seed=0)
    ok(run(*commands["extend"]))
    no_leftovers(tmp_path, "out")


@pytest.mark.slow
def test_twenty_kills_over_four_commands(run, tmp_path):
    from adapters import add_rope, make_adapter

    add_rope(make_adapter(Path(staging.__file__).parent / "assets/books-5m", tmp_path / "adapter"), "books-5m")
    ppl = ("eval", "ppl", "books-5m", "--lengths", "256,512", "--stride", 128, "--num-bootstrap", 20)
    methods = ("compare", "books-5m", "--methods", "none,ntk", "--lengths", "256,512", "--stride", 128, "--no-passkey")
    commands = {
        "extend": ("extend", "books-5m", "--method", "yarn", "--factor", 8, "--copy", "--force", "-o", "extend"),
        "merge": ("merge", "adapter", "--force", "-o", "merge"),
        "ppl": (*ppl, "--max-tokens", 2048, "--force", "-o", "ppl"),
        "compare": (*methods, "--max-tokens", 2048, "--num-bootstrap", 20, "--force", "-o", "compare"),
    }
    seconds = {}
    for name, words in commands.items():
        started = time.monotonic()
        longext(tmp_path, *map(str, words)).check_returncode()
        seconds[name] = time.monotonic() - started
    kill_at_random(tmp_path, commands, seconds, 20, seed=1)
    for words in commands.values():
        ok(run(*words))
    no_leftovers(tmp_path, "adapter", *commands)
