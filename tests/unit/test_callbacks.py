"""What a run writes while it trains."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from longext.training import callbacks
from longext.training.callbacks import Metrics, read_metrics


def test_the_rate_counts_steps_and_leaves_measurements_out(tmp_path, monkeypatch):
    """A measurement runs after a step and before its line is written."""
    clock = [100.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock[0])
    metrics = Metrics(tmp_path / "metrics.jsonl", 1000)
    args, control = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(should_log=False)
    metrics.on_train_begin(args, SimpleNamespace(global_step=0, max_steps=3, compute_steps=lambda *_: None), control)

    def measure(step, seconds):
        clock[0] += seconds
        metrics.evaluation(step, {64: 2.0})

    measure(0, 50.0)
    for step, pause in ((1, 0.0), (2, 30.0), (3, 70.0)):
        state = SimpleNamespace(global_step=step, max_steps=3)
        clock[0] += 2.0
        metrics.on_step_end(args, state, control)
        if pause:
            measure(step, pause)
        metrics.on_log(args, state, control, {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0})
    rates = [line["tokens_per_second"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert rates == pytest.approx([500.0] * 3)


def test_a_resumed_run_saves_and_logs_as_it_is_told_now():
    state = TrainerState(global_step=4, max_steps=8, save_steps=1, logging_steps=1)  # as its checkpoint holds them
    args = SimpleNamespace(save_steps=5, logging_steps=2, eval_steps=None)
    Metrics(None, 1000).on_train_begin(args, state, None)
    assert (state.global_step, state.save_steps, state.logging_steps) == (4, 5, 2)
