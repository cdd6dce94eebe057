"""Two shallow models of the real width, run for two steps each on this machine, to calibrate a plan.

Random weights: cost does not depend on their values. The architecture is the model's own with 2 and 4 layers, so the
difference of the two is the cost of a layer and the rest is what every depth pays. Full attention by SDPA, PEFT's LoRA,
gradient checkpointing per layer, logits in one piece.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from longext.checkpoint.load import build_model, load_config
from longext.errors import ConfigError
from longext.planning.flops import training_flops
from longext.planning.memory import plan_memory
from longext.planning.setup import TrainingSetup
from longext.planning.shape import ModelShape
from longext.planning.tracker import MemoryTracker
from longext.training.config import FinetuneConfig
from longext.training.loading import enable_checkpointing
from longext.training.tuning import make_trainable

DEPTHS = (2, 4)
_GUESS = {"cpu": 5e10, "cuda": 2e14}  # FLOP/s, to choose a length that takes seconds; only the measurement is used
_SECONDS = 8.0  # at most, by that guess, for one step of the deeper model
_SHORTEST = 128
_TUNINGS = {"longlora": "lora+embed+norm", "lora": "lora", "full": "full"}


@dataclass(frozen=True, kw_only=True)
class ProbeRun:
    """One depth, measured: seconds of the second step, bytes at the peak of a step (model, states and activations)."""

    num_layers: int
    seconds: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured on this machine and what follows from it.

    Attributes:
        runs: the measured depths, shallow first.
        length: the length measured (the asked one, or shorter if that would take long).
        is_whole: the model is no deeper than the deepest run, so nothing was extrapolated over layers.
        seconds, peak: of a batch at `length` and the model's depth: linear in layers.
        flops_per_second: causal FLOPs of the layers over their time.
        memory_ratio: measured over planned peak of the deepest run.
        bytes_per_layer_token: what a further layer adds to the peak, weights and states left out, per token.
        asked_seconds, asked_peak: the closed forms at the asked length and attention, scaled by the two above.
    """

    device: str
    dtype: str
    runs: tuple[ProbeRun, ...]
    length: int
    num_layers: int
    is_whole: bool
    seconds: float
    peak: float
    flops_per_second: float
    memory_ratio: float
    bytes_per_layer_token: float
    asked_length: int
    asked_seconds: float
    asked_peak: float


def probe_machine(directory: Path, shape: ModelShape, setup: TrainingSetup) -> Probe:
    """Measure two steps at two depths and calibrate the plan of `setup` with them.

    Args:
        directory: the model; only its config.json is read.
        setup: the planned run; measured on one device, in float32 on a CPU and bfloat16 on CUDA.

    Raises:
        ConfigError: not even the shallow model at the shortest length fits this machine.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = 2 if device.type == "cuda" else 4
    measured = dataclasses.replace(
        setup, batch_size=1, attention="full", checkpointing=True, checkpoint_every=1, nested=1, loss_chunk=None,
        offload=False, sweep=None, kv_memory=None, tile=None, kernels="none", sharding="none", num_gpus=1,
        sequence_parallel=1, compute_bytes=width,
    )  # fmt: skip
    depths = sorted({min(depth, shape.num_layers) for depth in DEPTHS})
    deepest = dataclasses.replace(shape, num_layers=depths[-1])
    measured = dataclasses.replace(measured, length=_probe_length(deepest, measured, device))
    runs = tuple(_measure(directory, shape, measured, depth, device) for depth in depths)
    return _calibrated(shape, setup, measured, runs, device)


def _probe_length(shape: ModelShape, setup: TrainingSetup, device: torch.device) -> int:
    """Return the asked length, halved until a step should take seconds and half of the free memory."""
    free = _free_memory(device) / 2
    length = setup.length
    while True:
        candidate = dataclasses.replace(setup, length=length)
        seconds = training_flops(shape, candidate, causal=True).total.total / _GUESS[device.type]
        needed = plan_memory(shape, candidate).needed
        if seconds <= _SECONDS and needed <= free:
            return length
        if length < 2 * _SHORTEST:
            if needed > free:
                raise ConfigError(
                    f"--probe needs {needed / 2**30:.1f} GiB for {shape.num_layers} layers at {length} tokens, half of "
                    f"this machine's free memory is {free / 2**30:.1f} GiB. Plan without --probe."
                )
            return length
        length //= 2


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)  # unused pages and those of the page cache that can be dropped


def _measure(directory: Path, shape: ModelShape, setup: TrainingSetup, depth: int, device: torch.device) -> ProbeRun:
    """Run two steps at `depth` layers: the first warms up and is tracked, the second is timed."""
    gc.collect()  # the model of the depth before
    model = _build(directory, setup, depth, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # as Trainer does
    ids = torch.randint(0, shape.vocab_size, (1, setup.length), device=device)
    is_cuda = device.type == "cuda"

    def step() -> float:
        """Run a step; return its seconds."""
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=setup.compute_bytes < 4):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        # the peak of the second step, when the optimiser's states exist
        return ProbeRun(num_layers=depth, seconds=step(), peak=float(torch.cuda.max_memory_allocated(device)))
    with MemoryTracker(model.parameters()) as tracker:
        step()
    plan = plan_memory(dataclasses.replace(shape, num_layers=depth), setup)
    # a CPU keeps no count: operators are tracked, and the exact states added
    peak = float(tracker.peak + plan.weights + plan.optimizer)
    return ProbeRun(num_layers=depth, seconds=step(), peak=peak)


def _build(directory: Path, setup: TrainingSetup, depth: int, device: torch.device) -> Any:
    """Return the model with `depth` layers and random weights, trained as `setup.method` says."""
    config = load_config(directory).get_text_config()
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    dtype = torch.float32 if setup.is_full or setup.compute_bytes == 4 else torch.bfloat16
    with torch.device(device):
        model = build_model(config, dtype=dtype).train()
        config = FinetuneConfig(model=str(directory), tuning=_TUNINGS[setup.method], lora_r=setup.lora_r)
        trained, _ = make_trainable(model, config, str(directory))
    enable_checkpointing(model, offload=False)
    return trained


def _calibrated(
    shape: ModelShape, setup: TrainingSetup, measured: TrainingSetup, runs: tuple[ProbeRun, ...], device: torch.device
) -> Probe:
    """Extrapolate over layers and scale the closed forms of the asked run."""
    shallow, deep = runs[0], runs[-1]
    beyond, layers = shape.num_layers - deep.num_layers, max(1, deep.num_layers - shallow.num_layers)
    each = (deep.seconds - shallow.seconds) / layers if len(runs) > 1 else deep.seconds / deep.num_layers
    each_peak = (deep.peak - shallow.peak) / layers if len(runs) > 1 else 0.0
    shapes = [dataclasses.replace(shape, num_layers=run.num_layers) for run in (shallow, deep)]
    plans = [plan_memory(run_shape, measured) for run_shape in shapes]
    states = (plans[1].states - plans[0].states) / layers
    seconds, ratio = deep.seconds + beyond * each, deep.peak / plans[1].peak

    def flops(of: ModelShape, run: TrainingSetup) -> float:
        return training_flops(of, run, causal=True).total.total

    rate = flops(shape, measured) / seconds if seconds > 0 else flops(shapes[1], measured) / deep.seconds
    here = dataclasses.replace(setup, compute_bytes=measured.compute_bytes)
    threads = f"CPU, {torch.get_num_threads()} thread(s)"
    return Probe(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        dtype="float32" if measured.compute_bytes == 4 else "bfloat16",
        runs=runs,
        length=measured.length,
        num_layers=shape.num_layers,
        is_whole=beyond == 0,
        seconds=seconds,
        peak=deep.peak + beyond * each_peak,
        flops_per_second=rate,
        memory_ratio=ratio,
        bytes_per_layer_token=max(0.0, each_peak - states) / measured.length,
        asked_length=setup.length,
        asked_seconds=flops(shape, setup) / setup.sequence_parallel / rate,
        asked_peak=plan_memory(shape, here).peak * ratio,
    )
