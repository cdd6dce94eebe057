"""The launcher of several processes, on workers that need no torch: one line, the right exit code, no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longext.processes import launcher

TESTS = Path(__file__).parents[1]
LAUNCH = (
    "import sys; from longext.processes.launcher import launch; "
    "sys.exit(launch(2, sys.argv[2:], grace=float(sys.argv[1]), settle=0.7, module='fake_worker'))"
)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")


@pytest.fixture
def start(tmp_path):
    """start(what rank 0 does, what rank 1 does) -> the launcher, once both are at work; none of the three outlives."""
    started = []

    def begin(*what, grace=30.0, **options):
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", LAUNCH, str(grace), *what]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes, **options))
        wait_until(lambda: started[0].poll() is not None or len(list(tmp_path.glob("?.pid"))) == 2)
        return started[0]

    yield begin
    for pid in [*pids(tmp_path), *(process.pid for process in started)]:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def pids(directory):
    return [int(file.read_text()) for file in sorted(directory.glob("?.pid"))]


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ended(process, tmp_path):
    """Return (exit code, standard error) of a launcher that ended, and hold that nothing of it is left."""
    _, errors = process.communicate(timeout=60)
    assert not any(is_alive(pid) for pid in pids(tmp_path))
    assert not list(tmp_path.glob("longext-launch-*"))
    return process.returncode, errors


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        (("ok", "ok"), 0, ""),
        (("fails:2", "fails:2"), 2, "has bad data"),
        (("loses a peer", "fails:2"), 2, "rank 1 has bad data"),
        (("sleeps", "fails:1"), 1, "rank 1 has bad data"),
        (("loses a peer", "dies:9"), 1, "process 1 of 2 was ended by SIGKILL (killed for want of memory?)"),
        (("sleeps", "crashes"), 1, "process 1 of 2 ended with exit code 1: RuntimeError: unforeseen"),
    ],
)
def test_a_job_ends_with_the_line_and_the_code_of_the_first_failure(start, tmp_path, monkeypatch, what, code, line):
    found, errors = ended(start(*what), tmp_path)
    assert found == code
    assert line in errors
    assert errors.count("\n") == bool(line), errors


@pytest.mark.parametrize(
    ("number", "what", "code", "line"),
    [
        (signal.SIGTERM, "stops", 143, "longext: stopped by SIGTERM\n"),
        (signal.SIGINT, "stops", 130, "longext: stopped by SIGINT\n"),
        (signal.SIGHUP, "stops", 129, "longext: stopped by SIGHUP\n"),
        (signal.SIGTERM, "ends well", 0, ""),  # it came in the last step: the work is complete
        (signal.SIGTERM, "sleeps", 143, "interrupted by SIGTERM"),  # before there is a handler
    ],
)
def test_a_signal_is_passed_on(start, tmp_path, number, what, code, line):
    process = start(what, what)
    process.send_signal(number)
    found, errors = ended(process, tmp_path)
    assert found == code
    assert line in errors
    assert errors.count("\n") == bool(line), errors


def test_a_stopped_worker_is_woken_up(start, tmp_path):
    process = start("stops", "stops")
    os.kill(pids(tmp_path)[1], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    assert ended(process, tmp_path)[0] == 143


def test_a_job_that_does_not_end_is_killed_after_the_grace(start, tmp_path, monkeypatch):
    process = start("deaf", "deaf", grace=0.5)
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process, tmp_path)
    assert code == 143
    assert "did not end after SIGTERM and were killed" in errors


def test_a_second_signal_ends_the_job_at_once(start, tmp_path):
    process = start("deaf", "deaf", grace=100)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, errors = ended(process, tmp_path)
    assert code == 130
    assert "were killed" in errors


@pytest.mark.parametrize("stopped", [False, True])
def test_workers_die_with_a_launcher_that_is_killed(start, tmp_path, stopped):
    process = start("deaf", "deaf")
    if stopped:
        os.kill(pids(tmp_path)[1], signal.SIGSTOP)
    process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in pids(tmp_path)), seconds=10)


def test_workers_of_another_launcher_die_with_it(tmp_path):
    """torchrun and accelerate tell their workers no process to end with: they look at who started them."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'fake_worker', 'deaf', 'deaf'])"
    variables = dict.fromkeys(("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"), "2") | {"RANK": "0", "MASTER_ADDR": "here"}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **variables, "PYTHONPATH": path}
    )
    wait_until(lambda: pids(tmp_path))
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(pids(tmp_path)[0]), seconds=10)


def test_an_ignored_signal_stays_ignored(start, tmp_path):
    """As under nohup: neither the launcher nor a worker ends at a hang-up, and both still end at SIGTERM."""
    process = start("stops", "stops", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    for pid in [process.pid, *pids(tmp_path)]:
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process, tmp_path) == (143, "longext: stopped by SIGTERM\n")


def test_under_torchrun_one_process_of_a_machine_speaks(tmp_path, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    for rank in ("1", "0"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        assert launcher.may_report("the data is bad", 2) is (rank == "1")  # the first to fail
        assert launcher.may_report("stopped", 143, everywhere=True) is (rank == "0")


def test_half_a_launch_is_none(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = (launcher.is_launched(), launcher.num_processes(), launcher.process_rank(), launcher.local_rank())
    assert found == (False, 1, 0, 0)
