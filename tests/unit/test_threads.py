"""The CPU threads of a run: as asked, else what the environment says, else the cores that are free."""

from __future__ import annotations

import pytest
import torch

from longext import threads
from longext.threads import free_cores, set_threads


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("loadavg", "cores"),
    [
        ("0.10 0.2 0.3 1/99 7", 4),
        ("8.00 8.0 8.0 1/99 7", 4),  # of a command that has ended
        ("4.00 4.0 4.0 5/99 7", 2),  # half of the machine's eight cores are taken
        ("9.00 9.0 9.0 12/99 7", 1),
        ("not what Linux writes", 4),
    ],
)
def test_cores_that_others_use_are_left_to_them(monkeypatch, loadavg, cores):
    monkeypatch.setattr(threads.Path, "read_text", lambda *_, **__: loadavg)
    assert free_cores() == cores


def test_what_is_asked_for_goes_before_the_environment_and_that_before_the_load(monkeypatch):
    monkeypatch.setattr(threads, "free_cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert set_threads(None) == 1
    assert set_threads(2) == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert set_threads(None) == 3
