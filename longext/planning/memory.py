"""Memory of a training step on one GPU, in closed form, part by part; bytes throughout.

What is modelled is transformers + peft with torch's autograd: base weights frozen at 16 bits, trained ones with their
gradients and AdamW's two moments at 32 bits, activations at 16 bits under autocast (or everything at 32 bits). A step
has phases that do not overlap: the end of the forward pass, the loss, one layer's backward. The peak is what stays
through all of them plus the largest phase. The update needs nothing more: AdamW is fused, as Trainer's default is.

The widths of saved tensors were read off autograd (`saved_tensors_hooks`) family by family; see docs/planning.md for
the agreement. Not modelled: attention that materialises its scores (eager), optimisers other than AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass

from longext.planning.devices import GIB
from longext.planning.setup import TrainingSetup
from longext.planning.shape import ModelShape

FULL = 4  # bytes of a float32: trained weights, gradients, moments, norms, softmax
CONTEXT = GIB  # CUDA context, library workspaces and fragmentation: what nvidia-smi shows beyond torch's peak
_LOSS_COPIES = 3  # log-softmax, its gradient and the logits' gradient, float32, at the loss's peak
_FORWARD_COPIES = 2  # float32 logits and log-softmax, besides the logits as computed


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU at the peak of a step.

    Attributes:
        weights: parameters as stored, this GPU's share.
        gradients: of the trained parameters (twice under ddp: its buckets copy them).
        optimizer: AdamW's two moments.
        gathered: other GPUs' shares of two layers, the embedding and the head, while fsdp uses them.
        saved: what the forward pass keeps for the backward pass: layer inputs under checkpointing, else all layers.
        phases: what each phase needs, `saved` included: forward, loss, layer. Only the largest counts.
        host: bytes in host memory (offloaded layer inputs).
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    saved: float
    phases: dict[str, float]
    host: float = 0.0

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def states(self) -> float:
        """Weights, gradients and optimiser: what stays between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """Bytes that torch's allocator hands out at the peak (`torch.cuda.max_memory_allocated`)."""
        return self.states + self.gathered + self.phases[self.phase]

    @property
    def needed(self) -> float:
        """Bytes a GPU must have: the peak and the CUDA context."""
        return self.peak + CONTEXT

    @property
    def parts(self) -> dict[str, float]:
        """The peak by part, each named as a user reads it; the sum is `needed`."""
        work = self.phases[self.phase] - self.saved
        in_layer = self.phase == "layer"
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "gathered weights": self.gathered,
            "saved activations": self.saved,
            "logits and loss": 0.0 if in_layer else work,
            "one layer's work": work if in_layer else 0.0,
            "CUDA context": float(CONTEXT),
        }


def plan_memory(shape: ModelShape, setup: TrainingSetup) -> MemoryPlan:
    """Return the memory of one training step on one GPU (sharding "auto" counts as none)."""
    trained = setup.trainable(shape)
    share = 1 / setup.num_gpus
    divided, divides_weights = (share if setup.sharding in kinds else 1.0 for kinds in (("zero2", "fsdp"), ("fsdp",)))
    gradients = trained * FULL * (2 if setup.sharding == "ddp" else 1)
    saved, host = _kept(shape, setup)
    return MemoryPlan(
        weights=weight_bytes(shape, setup) * divides_weights,
        gradients=gradients * divided,
        optimizer=trained * 2 * FULL * divided,
        gathered=_gathered(shape, setup) if setup.sharding == "fsdp" else 0.0,
        saved=saved,
        phases={name: saved + value for name, value in _phases(shape, setup).items()},
        host=host,
    )


def weight_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    """Return the bytes of all weights: the base as computed with, and what is trained at 32 bits besides.

    PEFT keeps the frozen original of a trained embedding or norm, so both count. Full training has one copy.
    """
    if setup.is_full:
        return shape.num_parameters * FULL
    return shape.num_parameters * setup.compute_bytes + setup.trainable(shape) * FULL


def kv_cache_bytes(shape: ModelShape, length: int, width: int = 2) -> int:
    """Return the bytes of the KV cache of one sequence at inference; `width` bytes an element."""
    return 2 * shape.num_layers * shape.kv_size * length * width


def stream_bytes(setup: TrainingSetup) -> int:
    """Return the bytes of an element of the hidden states between layers.

    Residual sums keep the width of the embedding's output, which the engine hands on at the width of the matrix
    products, also if the trained embedding is float32.
    """
    return setup.compute_bytes if setup.hidden_bytes is None else setup.hidden_bytes


def normed_bytes(setup: TrainingSetup) -> int:
    """Return the bytes of an element that a norm puts out: a trained norm's weight is float32, and so is its output."""
    if setup.hidden_bytes is not None:
        return setup.hidden_bytes
    return FULL if setup.trains_embeddings else setup.compute_bytes


def layer_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    """Return the bytes per token that autograd keeps for one layer without checkpointing.

    Full training keeps the input of every matrix; frozen matrices keep none, adapters keep theirs. Norms work at 32
    bits. A gated MLP keeps gate, activation and up (and their product if the down matrix is trained).
    """
    return _attention_bytes(shape, setup) + _norm_bytes(shape, setup) + _mlp_bytes(shape, setup)


def _attention_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    width, query, kv = setup.compute_bytes, shape.query_size, shape.kv_size
    kernel = width * 2 * (query + kv) + FULL * shape.num_heads  # q, k, v, output; log-sum-exp
    if shape.fused:
        kernel += width * (query + kv)  # v is a view, which keeps all of q, k and v
    if shape.layout.query_key_norm:
        kernel += (query + kv) * (FULL + (width if setup.is_full or setup.trains_embeddings else 0))
    inner = 0 if setup.is_full else width * setup.lora_r * (2 if shape.fused else 4)
    return kernel + inner + width * _matrix_inputs(shape, setup)


def _matrix_inputs(shape: ModelShape, setup: TrainingSetup) -> int:
    """Elements per token of the inputs that trained matrices and adapters keep, the attention output's own aside.

    Under autocast each matrix casts its input for itself, otherwise those that read the same tensor share it.
    """
    readers = 1 if shape.fused or not _is_mixed(setup) else 3
    if not setup.is_full:
        return readers * shape.hidden_size + (shape.query_size if _is_mixed(setup) else 0)
    mlp_readers = 2 if shape.layout.gated and not shape.fused and _is_mixed(setup) else 1
    return (readers + mlp_readers) * shape.hidden_size


def _norm_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    hidden, stream, count = shape.hidden_size, stream_bytes(setup), shape.layout.num_norms
    if shape.layout.norm_has_bias:
        at_32_bits = 2 if stream < FULL or not shape.layout.parallel else 1  # else both norms share their input
        return at_32_bits * hidden * FULL + 2 * count * FULL
    inputs = count * (hidden * FULL + FULL)  # at 32 bits, and one number a token
    return inputs + (count * hidden * stream if setup.trains_embeddings else 0)


def _mlp_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    saved = (3 if shape.layout.gated else 1) + (1 if setup.is_full else 0)
    return saved * shape.intermediate_size * setup.compute_bytes


def _is_mixed(setup: TrainingSetup) -> bool:
    return setup.compute_bytes < FULL


def _kept(shape: ModelShape, setup: TrainingSetup) -> tuple[float, float]:
    """Return (bytes on the GPU, bytes on the host) that the layers keep for the backward pass."""
    tokens, inputs = setup.local_tokens, shape.hidden_size * stream_bytes(setup)
    if not setup.checkpointing:
        return float(tokens * layer_bytes(shape, setup) * shape.num_layers), 0.0
    if setup.offload:
        here = min(2, shape.num_layers)  # one on its way, one in use
        return float(tokens * inputs * here), float(tokens * inputs * shape.num_layers)
    return float(tokens * inputs * shape.num_layers), 0.0


def _phases(shape: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Bytes beyond the saved ones at the end of the forward pass, in the loss and in one layer's backward.

    A loss in chunks computes its gradients in the forward pass: no logits outlive their chunk, but the head's input
    and its gradient stay.
    """
    logits, casts = setup.chunk_tokens * shape.vocab_size, _cast_bytes(shape, setup)
    kept_casts = 0 if setup.checkpointing else casts
    norm = _last_norm_bytes(shape, setup)
    loss = norm + logits * FULL * _LOSS_COPIES
    work = _layer_work(shape, setup) + kept_casts
    if setup.chunks_loss:
        states = normed_bytes(setup) if setup.trains_embeddings else setup.compute_bytes
        head = 2 * FULL * shape.head_weights if setup.is_full else 0  # its gradient so far, and the chunk's
        return {"loss": loss + 2 * setup.local_tokens * shape.hidden_size * states + casts + head, "layer": work}
    as_computed = logits * setup.compute_bytes if _is_mixed(setup) else 0
    forward = norm + as_computed + logits * FULL * _FORWARD_COPIES + casts
    return {"forward": forward, "loss": loss + kept_casts, "layer": work}


def _last_norm_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    """Bytes that the norm before the head keeps, and the head's input if the head is trained."""
    trained_head = setup.is_full or (shape.tied and setup.trains_embeddings)
    normed = stream_bytes(setup) if setup.trains_embeddings and not shape.layout.norm_has_bias else 0
    return setup.local_tokens * shape.hidden_size * (FULL + normed + (setup.compute_bytes if trained_head else 0))


def _layer_work(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes of one layer's backward: what it computed again, gradients inside the MLP and of its two streams."""
    tokens, width = setup.local_tokens, setup.compute_bytes
    inner = (3 if shape.layout.gated else 2) - (1 if setup.is_full else 0)  # the product is freed, its gradient lives
    gradients = inner * shape.intermediate_size * width + 2 * shape.hidden_size * stream_bytes(setup)
    again = layer_bytes(shape, setup) if setup.checkpointing else 0
    casts = shape.layer_weights * setup.compute_bytes if setup.is_full and _is_mixed(setup) else 0
    return float(tokens * (again + gradients) + casts)


def _cast_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    """Bytes of autocast's 16-bit copies of trained matrices, which it keeps until the forward pass is over."""
    if not _is_mixed(setup) or not setup.is_full or setup.sharding == "fsdp":
        return 0
    return setup.compute_bytes * (shape.num_layers * shape.layer_weights + shape.head_weights)


def _gathered(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes of whole weights under fsdp: the layer in use, the one fetched ahead, and the embedding and head."""
    ends = shape.head_weights * (1 if shape.tied else 2)
    return float(setup.compute_bytes * (2 * shape.layer_weights + ends))
