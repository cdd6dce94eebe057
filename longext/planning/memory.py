"""Memory of a training step, on one GPU and beside it in host memory, in closed form, part by part; bytes throughout.

What is modelled is transformers + peft with torch's autograd: base weights frozen at 16 bits, trained ones with their
gradients and AdamW's two moments at 32 bits, activations at 16 bits under autocast (or everything at 32 bits). A step
has phases that do not overlap: the end of the forward pass, the loss, one layer's backward. The peak is what stays
through all of them plus the largest phase. The update needs nothing more: AdamW is fused, as Trainer's default is.

A sweep has the activations of one chunk of the row, and besides what its chunks hand on: under S2-Attn keys and values
of half a group a chunk, under full attention those of all earlier tokens and their gradients.

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
        carried: keys and values, and their gradients, that the chunks of a sweep hand on.
        phases: what each phase needs, `saved` included: forward, loss, layer. Only the largest counts.
        host: bytes in pinned host memory: offloaded layer inputs, what a sweep keeps there.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    saved: float
    carried: float
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
        return self.states + self.gathered + self.carried + self.phases[self.phase]

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
            "keys and values": self.carried,
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
    saved = _kept(shape, setup)
    return MemoryPlan(
        weights=weight_bytes(shape, setup) * divides_weights,
        gradients=gradients * divided,
        optimizer=trained * 2 * FULL * divided,
        gathered=_gathered(shape, setup) if setup.sharding == "fsdp" else 0.0,
        saved=saved,
        carried=_carried(shape, setup),
        phases={name: saved + value for name, value in _phases(shape, setup).items()},
        host=host_bytes(shape, setup).total,
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
    """Return the bytes of an element that a norm puts out; the engine narrows that of a norm with float32 weights."""
    if setup.norm_bytes is not None and setup.trains_embeddings:
        return setup.norm_bytes
    return setup.compute_bytes


def layer_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    """Return the bytes per token that autograd keeps for one layer without checkpointing.

    Full training keeps the input of every matrix; frozen matrices keep none, adapters keep theirs. Norms work at 32
    bits. A gated MLP keeps gate, activation and up (and their product if the down matrix is trained). Liger's norms
    keep their input as it is, and its MLP gate and up.
    """
    if setup.tile and setup.tiles_norms:
        return _attention_bytes(shape, setup) + _tiled_inputs(shape, setup)
    return _attention_bytes(shape, setup) + _norm_bytes(shape, setup) + _mlp_bytes(shape, setup)


def _attention_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    width, query, kv = setup.compute_bytes, shape.query_size, shape.kv_size
    kernel = _kernel_bytes(shape, setup)
    if shape.fused:
        kernel += width * (query + kv)  # v is a view, which keeps all of q, k and v
    if shape.layout.query_key_norm:
        kernel += (query + kv) * _norm_input_bytes(setup, width)
    inner = 0 if setup.is_full else width * setup.lora_r * (2 if shape.fused else 4)
    return kernel + inner + width * _matrix_inputs(shape, setup)


def _kernel_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    """Bytes per token that the attention kernel keeps: q, k, v, the output; log-sum-exp."""
    return setup.compute_bytes * 2 * (shape.query_size + shape.kv_size) + FULL * shape.num_heads


def _matrix_inputs(shape: ModelShape, setup: TrainingSetup) -> int:
    """Elements per token of the inputs that trained matrices and adapters keep, the attention output's own aside.

    Those that read the same tensor share it, unless each casts it for itself: adapters that widen their input, and
    trained matrices with a float32 one.
    """
    if not setup.is_full:
        is_cast = _is_mixed(setup) and setup.widens_inputs
        return (3 if is_cast and not shape.fused else 1) * shape.hidden_size + (shape.query_size if is_cast else 0)
    is_cast = _is_mixed(setup) and normed_bytes(setup) > setup.compute_bytes and not shape.fused
    return ((3 if is_cast else 1) + (2 if is_cast and shape.layout.gated else 1)) * shape.hidden_size


def _norm_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    hidden, stream, count = shape.hidden_size, stream_bytes(setup), shape.layout.num_norms
    if shape.layout.norm_has_bias:
        at_32_bits = 2 if stream < FULL or not shape.layout.parallel else 1  # else both norms share their input
        return at_32_bits * hidden * FULL + 2 * count * FULL
    if setup.has_fused_kernels:  # the first norm's input is the layer's, which checkpointing keeps anyway
        return (count - 1 if setup.checkpointing else count) * hidden * stream + count * FULL
    return count * (hidden * _norm_input_bytes(setup, stream) + FULL)


def _norm_input_bytes(setup: TrainingSetup, width: int) -> int:
    """Bytes that a norm keeps for an element of its input: at 32 bits, and for trained weights normalised; or fused."""
    if setup.has_fused_kernels:
        return width
    return FULL + (width if setup.trains_embeddings else 0)


def _mlp_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    inner = (2 if setup.has_fused_kernels else 3) if shape.layout.gated else 1
    return (inner + (1 if setup.is_full else 0)) * shape.intermediate_size * setup.compute_bytes


def _is_mixed(setup: TrainingSetup) -> bool:
    return setup.compute_bytes < FULL


def _checkpointed(shape: ModelShape, setup: TrainingSetup) -> int:
    """Return how many layer inputs wait from the forward pass to the backward pass."""
    return -(-shape.num_layers // max(setup.nested, setup.checkpoint_every))


def _input_bytes(shape: ModelShape, setup: TrainingSetup) -> float:
    return float(setup.local_tokens * shape.hidden_size * stream_bytes(setup))


def _kept(shape: ModelShape, setup: TrainingSetup) -> float:
    """Return the bytes on the GPU that the layers keep for the backward pass.

    With offloading two layer inputs are here, one on its way and one in use. Nested checkpoints have the inputs of one
    run of layers too.
    """
    every_layer = float(setup.local_tokens * layer_bytes(shape, setup))
    if not setup.checkpointing:
        return every_layer * shape.num_layers
    waiting = _checkpointed(shape, setup)
    here = (min(2, waiting) if setup.offload else waiting) + (setup.nested if setup.nested > 1 else 0)
    others = 0 if setup.nested > 1 else shape.num_layers - waiting
    return here * _input_bytes(shape, setup) + others * every_layer


@dataclass(frozen=True, kw_only=True)
class HostBytes:
    """Bytes of pinned host memory of one GPU, by what they are, and what goes over the bus in a micro-batch.

    Attributes:
        layer_inputs: offloaded hidden states.
        keys_and_values: what the chunks of a sweep hand on, gradients included.
        moved: layer inputs that go out and come back while the GPU computes.
        awaited: keys, values and gradients that the GPU waits for.
    """

    layer_inputs: float
    keys_and_values: float
    moved: float
    awaited: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.layer_inputs + self.keys_and_values


def host_bytes(shape: ModelShape, setup: TrainingSetup) -> HostBytes:
    """Return what one GPU keeps in pinned host memory.

    Offloaded inputs go out and come back, once a chunk; halos too. Under full attention each pass over a chunk reads
    the keys and values of all tokens before it, and the backward pass reads and writes their gradients.
    """
    inputs = _checkpointed(shape, setup) * _input_bytes(shape, setup) if setup.offload else 0.0
    rows = -(-setup.length // (setup.chunk or setup.length))
    moved = 2 * inputs * rows
    if setup.chunk is None:
        return HostBytes(layer_inputs=inputs, keys_and_values=0.0, moved=moved)
    if setup.group is not None:
        halos = rows * halo_bytes(shape, setup)
        return HostBytes(layer_inputs=inputs, keys_and_values=halos, moved=moved, awaited=2 * halos)
    there = carried_bytes(shape, setup) - _here(shape, setup)
    share = there / carried_bytes(shape, setup)
    width, passes = setup.compute_bytes, 3 if setup.checkpointing else 2
    earlier = setup.batch_size * setup.chunk * rows * (rows - 1) // 2  # tokens before each chunk, all chunks together
    read = 2 * shape.num_layers * shape.kv_size * earlier * (passes * width + 2 * FULL)
    return HostBytes(layer_inputs=inputs, keys_and_values=there, moved=moved, awaited=share * read)


def halo_bytes(shape: ModelShape, setup: TrainingSetup) -> float:
    """Return the bytes that a chunk hands to the next under S2-Attn: keys and values of half a group, shifted heads.

    The heads from floor(heads / 2) on are shifted; a key-value head that both halves use counts. Chunks that are not
    whole groups hand on at most a group of all heads, or all of themselves: an upper bound.
    """
    assert setup.group is not None and setup.chunk is not None
    heads, tokens = shifted_kv_heads(shape), setup.group // 2
    if setup.chunk % setup.group:
        heads, tokens = shape.num_kv_heads, min(setup.chunk, setup.group)
    return 2.0 * setup.batch_size * shape.num_layers * heads * shape.head_dim * setup.compute_bytes * tokens


def shifted_kv_heads(shape: ModelShape) -> int:
    """Return how many key-value heads the shifted half of the query heads reads."""
    return shape.num_kv_heads - shape.num_heads // 2 // (shape.num_heads // shape.num_kv_heads)


def carried_bytes(shape: ModelShape, setup: TrainingSetup) -> float:
    """Return the bytes of keys and values of all tokens before the last chunk, and of their gradients.

    The first gradient that a later chunk leaves is kept as it is; sums are float32, which all tokens but those of the
    last chunk before have then.
    """
    assert setup.chunk is not None
    width, elements = setup.compute_bytes, 2 * setup.batch_size * shape.num_layers * shape.kv_size
    summed = max(0, setup.swept_tokens - setup.chunk)
    return float(elements * (setup.swept_tokens * 2 * width + summed * (FULL - width)))


def _here(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes of a full-attention sweep's keys, values and gradients that stay on the GPU."""
    whole = carried_bytes(shape, setup)
    return whole if setup.kv_memory is None else min(whole, setup.kv_memory * GIB)


def _carried(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes on the GPU that chunks hand on: two halos; or what `kv_memory` allows, and what a layer has beside it."""
    if setup.chunk is None:
        return 0.0
    if setup.group is not None:
        return 2 * halo_bytes(shape, setup)
    here = _here(shape, setup)
    others = (carried_bytes(shape, setup) - here) / shape.num_layers
    joined = 2 * shape.kv_size * setup.compute_bytes  # a layer's, in front of its own
    return here + others + setup.batch_size * setup.swept_tokens * joined


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
    stream = stream_bytes(setup)
    normed = FULL if shape.layout.norm_has_bias else _norm_input_bytes(setup, stream)
    kept = stream if setup.tile and setup.tiles_norms else normed
    return setup.local_tokens * shape.hidden_size * (kept + (setup.compute_bytes if trained_head else 0))


def _layer_work(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes of one layer's backward: what it computed again, gradients inside the MLP and of its two streams.

    If only every n-th layer is checkpointed, those behind the last of them are done when that one is computed again.
    """
    casts = float(shape.layer_weights * setup.compute_bytes if setup.is_full and _is_mixed(setup) else 0)
    gradients = _mlp_gradients(shape, setup) + 2 * shape.hidden_size * stream_bytes(setup)
    if not setup.checkpointing:
        return casts + setup.local_tokens * gradients
    if setup.tile is not None:
        work = _tiled_work(shape, setup)
    else:
        again = float(setup.local_tokens * (layer_bytes(shape, setup) + gradients))
        work = max(again, _attention_work(shape, setup))
    behind = (shape.num_layers - 1) % setup.checkpoint_every * setup.local_tokens * layer_bytes(shape, setup)
    return casts + max(work - behind, float(setup.local_tokens * gradients) if behind else 0.0)


def _attention_work(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes of one checkpointed layer's backward while it is in its attention, the MLP behind it done.

    The larger of two moments: the backward pass of the output's adapter, which makes its input's gradient twice; and
    that of the kernel, with gradients of its output, of q, k and v. In a sweep keys and values of earlier tokens have
    gradients too, which are joined to those of its own.
    """
    width, stream = setup.compute_bytes, shape.hidden_size * stream_bytes(setup)
    query, kv = shape.query_size, shape.kv_size
    tiled = setup.tile is not None and setup.tiles_norms
    norm = shape.hidden_size * width if tiled else _norm_bytes(shape, setup) // shape.layout.num_norms
    again = setup.local_tokens * (_attention_bytes(shape, setup) + norm)
    cast = FULL if _is_mixed(setup) and setup.widens_inputs else 0
    adapter = 0 if setup.is_full else query * (width + cast) + shape.hidden_size * width
    output = setup.local_tokens * (3 * stream + query * width + adapter)
    earlier = 0 if setup.group else setup.batch_size * setup.swept_tokens * 4 * kv * width
    kernel = setup.local_tokens * (width * (2 * query + 2 * kv) + stream) + earlier
    return float(again + max(output, kernel))


def _mlp_gradients(shape: ModelShape, setup: TrainingSetup) -> int:
    """Bytes per token of gradients inside an MLP: the product is freed, its gradient lives. Liger works in place."""
    inner = (3 if shape.layout.gated else 2) - (1 if setup.is_full else 0)
    return (1 if setup.has_fused_kernels else inner) * shape.intermediate_size * setup.compute_bytes


def _tiled_work(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes of one checkpointed layer's backward if MLP and norms work on a tile at a time and keep their input alone.

    The largest moment is a tile's, beside the gradients of the MLP's output and input, or the attention's. Gradients of
    the MLP's weights are there three times: a tile's, their sum, and what is added up. If the norms are not tiled, the
    largest moment is the backward pass of the second: three float32 tensors and the gradient that comes in.
    """
    assert setup.tile is not None
    hidden, stream, tokens = shape.hidden_size, stream_bytes(setup), setup.local_tokens
    tile = min(setup.tile, tokens) * (_mlp_bytes(shape, setup) + _mlp_gradients(shape, setup))
    attention = _attention_bytes(shape, setup)
    if not setup.tiles_norms:
        again = attention + _norm_bytes(shape, setup)
        norm = hidden * (stream + normed_bytes(setup) + 3 * FULL)
        mlp = hidden * (normed_bytes(setup) + 2 * stream)
        return float(max(tokens * (again + norm), tokens * (again + mlp) + tile))
    norms = min(setup.tile, tokens) * (_norm_bytes(shape, setup) + 3 * hidden * FULL)
    mlp = attention + _tiled_inputs(shape, setup) + 2 * hidden * stream
    weights = 3 * FULL * shape.mlp_weights if setup.is_full else 0
    return weights + max(_attention_work(shape, setup), float(tokens * mlp + max(tile, norms)))


def _tiled_inputs(shape: ModelShape, setup: TrainingSetup) -> int:
    """Bytes per token that a layer's tiled MLP and norms keep: their inputs; the first norm's is the layer's."""
    norms = shape.layout.num_norms - (1 if setup.checkpointing else 0)
    return shape.hidden_size * (norms * stream_bytes(setup) + normed_bytes(setup))


def _cast_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    """Bytes of autocast's 16-bit copies of trained matrices, which it keeps until the forward pass is over."""
    if not _is_mixed(setup) or not setup.is_full or setup.sharding == "fsdp":
        return 0
    return setup.compute_bytes * (shape.num_layers * shape.layer_weights + shape.head_weights)


def _gathered(shape: ModelShape, setup: TrainingSetup) -> float:
    """Bytes of whole weights under fsdp: the layer in use, the one fetched ahead, and the embedding and head."""
    ends = shape.head_weights * (1 if shape.tied else 2)
    return float(setup.compute_bytes * (2 * shape.layer_weights + ends))
