"""Sweeps, tiles, nested and sparse checkpoints as they are planned, against steps that were counted.

Memory: every storage, within TOLERANCE (10 %, as in test_plan_memory.py). FLOPs: those of matrix products, within 2 %.
Chunks of full attention are compared in bfloat16: the CPU's float32 kernel makes copies that CUDA's does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import transformers
from steps import FAMILIES, SIZES, build, peak_of, setup_for
from torch.utils._python_dispatch import TorchDispatchMode

from longext.attention.layout import make_layout
from longext.attention.shifted import PLAN, AttentionPlan, register_attention
from longext.attention.variant import ATTENTION_VARIANTS
from longext.planning.flops import training_flops
from longext.planning.memory import carried_bytes, halo_bytes, host_bytes, plan_memory, shifted_kv_heads
from longext.planning.setup import AUTO, TrainingSetup, loss_tokens
from longext.planning.shape import shape_of
from longext.training.layers.tiles import token_wise_modules, use_tiles
from longext.training.losses import chunk_for, chunked_loss, shift
from longext.training.sweep import chunk_tokens, sweep_rows

TOLERANCE = 0.10
LENGTH, GROUP, CHUNK, TILE, LOSS = 1024, 128, 256, 64, 32
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class Step:
    """A small model, its setup as planned, and a step of it; `sweep` runs rows in chunks."""

    def __init__(
        self, family="llama", method="longlora", mixed=True, attention="s2", length=LENGTH, heads=None, **lean
    ):
        name, extra, targets = FAMILIES[family]
        lean = {"sweep": None, "tile": None, "nested": 1, "checkpoint_every": 1, **lean}
        layers = {"num_hidden_layers": lean.pop("layers", 3)}
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra, **layers, **(heads or {})})
        every, nested, tile = lean["checkpoint_every"], lean["nested"], lean["tile"]

        def prepare(model):
            if tile:
                use_tiles(model, token_wise_modules(model), tile)

        self.model = build(config, targets, method, True, mixed, prepare, every=every, nested=nested)
        self.base = self.model if method == "full" else self.model.get_base_model()
        register_attention()
        self.base.set_attn_implementation(ATTENTION_VARIANTS[attention].implementation)
        self.shape = shape_of(config.to_dict(), Path(family))
        group = GROUP if attention == "s2" else None
        planned = setup_for(method, mixed, True, length)
        self.setup = dataclasses.replace(planned, attention=attention, group_size=group, loss_chunk=LOSS, **lean)
        ids = torch.randint(0, 512, (1, length))
        positions = torch.arange(length)[None]
        self.tensors = {"input_ids": ids, "position_ids": positions, "labels": ids, "shift_labels": shift(ids)}
        self.plan, self.mixed = AttentionPlan(make_layout(1, length), group or 2), mixed

    def __call__(self) -> None:
        amp = torch.autocast("cpu", torch.bfloat16) if self.mixed else contextlib.nullcontext()
        length, chunk = self.setup.length, self.setup.chunk
        with chunked_loss(self.base, LOSS):
            if chunk is not None:
                sweep_rows(self.model, self.tensors, self.plan, chunk, length, autocast=lambda: amp)
                return
            with amp:
                loss = self.model(**self.tensors, use_cache=False, **{PLAN: self.plan}).loss
            loss.backward()

    def planned_peak(self) -> float:
        """Bytes of activations, what is on a GPU's host included: a CPU has one memory."""
        memory = plan_memory(self.shape, self.setup)
        return memory.phases[memory.phase] + memory.carried + memory.host

    def peak(self) -> int:
        """Bytes of activations as counted."""
        return peak_of(self, self.model, self.tensors.values())


def agrees(step: Step) -> None:
    assert step.planned_peak() == pytest.approx(step.peak(), rel=TOLERANCE)


@pytest.mark.parametrize(("method", "mixed"), list(itertools.product(["lora", "longlora", "full"], [False, True])))
def test_the_peak_with_tiles(method, mixed):
    agrees(Step(method=method, mixed=mixed, tile=TILE))


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_the_peak_with_tiles_of_other_families(family):
    agrees(Step(family, tile=TILE))


@pytest.mark.parametrize(
    "lean",
    [
        {"nested": 3, "layers": 9},
        {"nested": 3, "layers": 9, "tile": TILE},
        {"checkpoint_every": 2, "layers": 6},
        {"checkpoint_every": 3, "layers": 6},
        {"checkpoint_every": 2, "layers": 4, "tile": TILE},
    ],
)
def test_the_peak_with_fewer_or_more_checkpoints(lean):
    agrees(Step(method="lora", **lean))


@pytest.mark.parametrize(("method", "mixed"), list(itertools.product(["longlora", "full"], [False, True])))
def test_the_peak_of_a_sweep_of_groups(method, mixed):
    """Twice the row: the halos alone grow, as planned."""
    steps = [Step(method=method, mixed=mixed, sweep=CHUNK, length=length) for length in (1024, 2048)]
    peaks = [step.peak() for step in steps]
    for step, peak in zip(steps, peaks, strict=True):
        assert step.planned_peak() == pytest.approx(peak, rel=TOLERANCE)
    hosts = [host_bytes(step.shape, step.setup).total for step in steps]
    assert peaks[1] - peaks[0] == pytest.approx(hosts[1] - hosts[0], rel=0.02)


@pytest.mark.parametrize("length", [512, 1024])
@pytest.mark.parametrize("heads", [{"num_key_value_heads": 2}, {"num_key_value_heads": 4}])
def test_the_peak_of_a_sweep_of_full_attention(heads, length):
    """Eight layers: in the first to be swept again gradients are still at 16 bits, which is not planned."""
    agrees(Step(attention="full", sweep=CHUNK, length=length, heads=heads, layers=8))


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products; FlopCounterMode cannot follow a loss that calls autograd itself."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.flops += 2 * result.numel() * args[-2].shape[-1]
        return result


def products(step: Step) -> int:
    """FLOPs of matrix products, attention left out."""
    with Products() as counter:
        step()
    return counter.flops


@pytest.mark.parametrize(
    "lean",
    [
        {},
        {"sweep": CHUNK},
        {"sweep": 384},
        {"sweep": CHUNK, "attention": "full", "tile": TILE},
        {"tile": TILE},
        {"nested": 3, "layers": 7},
        {"nested": 2, "layers": 4, "sweep": CHUNK, "tile": TILE},
        {"checkpoint_every": 2, "layers": 5},
    ],
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_flops_of_matrix_products(method, lean):
    step = Step(method=method, mixed=False, **lean)
    planned = training_flops(step.shape, step.setup, causal=True).total
    assert planned.total - planned.attention == pytest.approx(products(step), rel=0.02)


def test_halos_of_llama_3_8b():
    """Chunks of one group: half of the key-value heads, half of the tokens: 32,768 bytes a token in host memory."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    shape = shape_of({"model_type": "llama", **sizes, "intermediate_size": 14336, "vocab_size": 128256}, Path("llama3"))
    setup = TrainingSetup(length=2**20, group_size=8192, sweep=AUTO)
    assert setup.chunk == 8192
    assert host_bytes(shape, setup).total == 32768 * 2**20
    assert plan_memory(shape, setup).carried == 2 * halo_bytes(shape, setup)
    short = plan_memory(shape, dataclasses.replace(setup, length=2**18))
    assert plan_memory(shape, setup).peak == short.peak
    wider = dataclasses.replace(setup, sweep=16384)
    assert host_bytes(shape, wider).total == 16384 * 2**20
    full = dataclasses.replace(setup, attention="full", sweep=8192)
    keys_and_values, sums = 131072 * (2**20 - 8192), 262144 * (2**20 - 2 * 8192)
    assert carried_bytes(shape, full) == keys_and_values + sums + 131072 * 8192
    assert host_bytes(shape, full).total == 0
    there = host_bytes(shape, dataclasses.replace(full, kv_memory=0.0))
    assert there.total == carried_bytes(shape, full)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shifted"), [(4, 4, 2), (4, 2, 1), (4, 1, 1), (6, 2, 1), (6, 3, 2), (5, 5, 3), (9, 3, 2)]
)
def test_key_value_heads_of_the_shifted_half(heads, kv_heads, shifted):
    """A head that both halves read counts."""
    sizes = {**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    shape = shape_of({"model_type": "llama", **sizes}, Path("llama"))
    assert shifted_kv_heads(shape) == shifted == len({i * kv_heads // heads for i in range(heads // 2, heads)})


@pytest.mark.parametrize("group", [None, 2048, 3000, 8192, 10000, 20000])
def test_chunks_are_those_that_finetune_takes(group):
    attention = "full" if group is None else "s2"
    for text, sweep in (("auto", AUTO), ("4096", 4096), ("off", None)):
        setup = TrainingSetup(length=65536, attention=attention, group_size=group, sweep=sweep)
        assert setup.chunk == chunk_tokens(text, 65536, group)


@pytest.mark.parametrize("vocabulary", [512, 32000, 49152, 128256, 151936, 262208, 10**7])
def test_chunks_of_the_loss_are_those_that_finetune_takes(vocabulary):
    assert loss_tokens(vocabulary) == chunk_for(vocabulary)
