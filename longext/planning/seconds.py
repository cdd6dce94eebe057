"""Seconds of a training step: matrix products, attention and memory-bound work at rates of their own, and the bus.

A step's matrix products run at MATRIX of the device's peak, its attention at ATTENTION of it, and everything that reads
and writes tensors without computing much (norms, RoPE, residual sums, casts, adapters of low rank, the softmax of the
loss) at BANDWIDTH of its memory's. Offloaded layer inputs go to host memory and back at BUS beside them, and the longer
of the two counts; for a sweep's keys and values the GPU waits. Left out: communication of GPUs, the update, the first
step's compilation and allocation but for `pinning`.

The rates are fractions measured on H200s and taken for all devices; which runs BANDWIDTH and PINNING were fitted to,
and how well the others are met, is in tests/parity/test_plan_gpu.py and docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from longext.planning.devices import Device
from longext.planning.flops import again_of_layers, training_flops
from longext.planning.memory import FULL, host_bytes
from longext.planning.setup import TrainingSetup
from longext.planning.shape import ModelShape

MATRIX = 0.713  # of the peak: a step's matrix products at 32,768 tokens by the profiler, 1.70 s
ATTENTION = 0.557  # of the peak: measured on attention alone
BANDWIDTH = 0.60  # of the memory's: fitted to one run
BUS = 25e9  # bytes a second between a GPU and pinned host memory
PINNING = 3.3e9  # bytes a second that the first step pins: fitted to one run

# Bytes that a token reads and writes, forward and backward, for an element: as torch's operators do them one by one at
# 16 bits, and as Liger's kernels do. Counted operator by operator; tests/parity/test_plan_traffic.py counts again.
_NORM = {"frozen": (36, 85), "trained": (44, 115), "wide": (44, 133), "liger": (4, 6)}
_ROPE = {"none": (20, 33), "liger": (8, 8)}
_ACTIVATION = {"none": (10, 18), "liger": (6, 10)}
_RESIDUAL = (12, 28)  # both sums of a layer
_ADAPTER_IN = {"widened": (14, 22), "as it is": (2, 10)}
_ADAPTER_OUT = (12, 8)
_LOSS = 44  # an element of the logits, both passes


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of one micro-batch by what they go to.

    Attributes:
        matrices: matrix products.
        attention: scores and their product with the values.
        elementwise: work that the memory's bandwidth bounds.
        transfers: between GPU and host, while the GPU computes.
        waiting: for transfers, in sweeps.
        pinning: what the first step takes longer: host memory is pinned.
    """

    matrices: float
    attention: float
    elementwise: float
    transfers: float
    waiting: float
    pinning: float

    @property
    def compute(self) -> float:
        """What the GPU computes."""
        return self.matrices + self.attention + self.elementwise

    @property
    def total(self) -> float:
        """One micro-batch: the longer of computation and transfers, and what the GPU waits for."""
        return max(self.compute, self.transfers) + self.waiting


def step_seconds(
    shape: ModelShape, setup: TrainingSetup, device: Device, utilisation: float | None = None
) -> StepSeconds:
    """Return the seconds of one micro-batch on the GPUs that share a sequence.

    float32 runs at half the 16-bit peak (TF32).

    Args:
        utilisation: fraction of the peak that all FLOPs together reach, instead of the three rates.
    """
    flops = training_flops(shape, setup, causal=True).total
    peak = device.tflops * 1e12 * (1.0 if setup.compute_bytes < 4 else 0.5) * setup.sequence_parallel
    rest = flops.total - flops.attention
    moved = moved_bytes(shape, setup) / (device.bandwidth * 1e9 * BANDWIDTH * setup.sequence_parallel)
    host = host_bytes(shape, setup)
    return StepSeconds(
        matrices=rest / (peak * (utilisation or MATRIX)),
        attention=flops.attention / (peak * (utilisation or ATTENTION)),
        elementwise=0.0 if utilisation else moved,
        transfers=host.moved / BUS,
        waiting=host.awaited / BUS,
        pinning=host.total / PINNING,
    )


def moved_bytes(shape: ModelShape, setup: TrainingSetup) -> float:
    """Return the bytes that memory-bound operators read and write in one micro-batch, all GPUs together."""
    forward, backward = layer_traffic(shape, setup)
    if setup.tile and setup.tiles_norms:  # norms once more in their own backward pass
        backward += shape.layout.num_norms * shape.hidden_size * _NORM[_norm_kind(setup)][0] * setup.compute_bytes / 2
    passes = 1 + sum(again_of_layers(shape, setup)) + setup.swept_tokens / setup.length
    tokens = setup.batch_size * setup.length
    return tokens * (shape.num_layers * (passes * forward + backward) + shape.vocab_size * _LOSS)


def layer_traffic(shape: ModelShape, setup: TrainingSetup) -> tuple[float, float]:
    """Return the bytes a token that memory-bound operators of one layer read and write, forward and backward."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads = shape.query_size + shape.kv_size
    kernels = "liger" if setup.has_fused_kernels else "none"
    normed = shape.layout.num_norms * hidden + (heads if shape.layout.query_key_norm else 0)
    work: list[tuple[float, tuple[int, int]]] = [
        (normed, _NORM[_norm_kind(setup)]),
        (heads, _ROPE[kernels]),
        (hidden, _RESIDUAL),
    ]
    work.append((inner if shape.layout.gated else inner / 2, _ACTIVATION[kernels]))
    if not setup.is_full:
        outputs = heads + shape.kv_size  # of q, k and v
        widened = setup.widens_inputs and setup.compute_bytes < FULL
        adapter_in = _ADAPTER_IN["widened" if widened else "as it is"]
        work.append(((1 if shape.fused else 3) * hidden + shape.query_size, adapter_in))
        work.append((outputs + hidden, _ADAPTER_OUT))
    scale = setup.compute_bytes / 2
    forward, backward = (scale * sum(size * each[i] for size, each in work) for i in (0, 1))
    return forward, backward


def _norm_kind(setup: TrainingSetup) -> str:
    if setup.has_fused_kernels:
        return "liger"
    if not setup.trains_embeddings:
        return "frozen"
    return "wide" if (setup.norm_bytes or setup.compute_bytes) > setup.compute_bytes else "trained"
