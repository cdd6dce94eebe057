"""FLOPs of a decoder in closed form, part by part.

Conventions. A multiply-add is two FLOPs. Only matrix products count: norms, activations, softmax and RoPE are left out,
as in torch's FLOP counter and in the FLOPs table of LongLoRA (arXiv 2309.12307, appendix). Attention comes in two
countings:

- `causal=False`: every query meets every key of its group, 4 N^2 D a layer under full attention. This is what torch's
  counter and the paper's table say.
- `causal=True`: only the pairs that a causal kernel computes, about half. Times are made of these.

The paper's table is `causal=False, wraps=True`, logits included ("Others"): its shifted groups are a rotation of the
sequence, N / G groups of G like the unshifted ones. longext cuts the wrapped group into its two ends of G / 2, which
saves G^2 / 4 pairs a head (0.5 % of the total at 8k, 2.4 % at 64k).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from longext.planning.setup import TrainingSetup
from longext.planning.shape import ModelShape

FLASH_BACKWARD = 2.5  # five products (the scores once more) for the forward's two
PLAIN_BACKWARD = 2.0  # four, with the scores kept in memory


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by part.

    Attributes:
        projections: q, k, v and o.
        attention: scores and their product with the values.
        mlp: the MLP's matrices.
        head: the logits.
        adapters: LoRA.
    """

    projections: float = 0.0
    attention: float = 0.0
    mlp: float = 0.0
    head: float = 0.0
    adapters: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return float(sum(vars(self).values()))

    @property
    def attention_share(self) -> float:
        """The fraction of the total that scores and values take."""
        return self.attention / self.total

    def __add__(self, other: Flops) -> Flops:
        return Flops(**{part: value + getattr(other, part) for part, value in vars(self).items()})

    def times(self, factor: float) -> Flops:
        """Return every part multiplied by `factor`."""
        return Flops(**{part: value * factor for part, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """FLOPs of one micro-batch: forward, a sweep's pass without a graph, what is computed again, backward."""

    forward: Flops
    sweep: Flops
    recompute: Flops
    backward: Flops

    @property
    def total(self) -> Flops:
        """All together: what the hardware computes."""
        return self.forward + self.sweep + self.recompute + self.backward


def attention_pairs(length: int, group: int | None = None, *, causal: bool, wraps: bool = False) -> float:
    """Return how many (query, key) pairs a head computes, the mean over the heads of a layer.

    Args:
        length: N, tokens.
        group: G of S2-Attn: half of the heads attend in groups of G, half in groups shifted by G / 2; None for full.
        causal: count only keys at or before the query.
        wraps: the shifted groups wrap around the end as published; else each end of G / 2 is a group of its own.
    """

    def inside(size: int) -> int:
        return size * (size + 1) // 2 if causal else size * size

    def cut(tokens: int) -> int:
        """Return the pairs of groups that begin at the first of `tokens`, the last one what is left."""
        assert group is not None
        return tokens // group * inside(group) + inside(tokens % group)

    if group is None or group >= length:
        return float(inside(length))
    if wraps:
        return float(cut(length))
    first = group // 2
    return (cut(length) + inside(first) + cut(length - first)) / 2


def forward_flops(
    shape: ModelShape, length: int, group: int | None = None, *, causal: bool, wraps: bool = False
) -> Flops:
    """Return the FLOPs of one forward pass over one sequence of `length` tokens, logits of every token included."""
    layers, tokens = shape.num_layers, 2.0 * length
    pairs = attention_pairs(length, group, causal=causal, wraps=wraps)
    return Flops(
        projections=tokens * layers * shape.projection_weights,
        attention=4.0 * pairs * shape.query_size * layers,
        mlp=tokens * layers * shape.mlp_weights,
        head=tokens * shape.head_weights,
    )


def training_flops(
    shape: ModelShape, setup: TrainingSetup, *, causal: bool, flash: bool = True, wraps: bool = False
) -> TrainingFlops:
    """Return the FLOPs of one micro-batch (forward, recomputation, backward), all GPUs together, for one `batch_size`.

    A product X W costs the same forward, for the gradient of X and for the gradient of W; the last is not computed for
    frozen W. Checkpointing computes each layer once more, but for its last matrix if nothing behind it needs that
    (torch stops early). A loss in chunks computes its gradients at once, so its logits are not computed again. Nested
    checkpoints compute all layers but the last of each run of `nested` once more; a sweep goes forward once more over
    all chunks but the last, without the head. A tiled MLP runs again in its own backward pass, and in its layer's only
    if a norm follows it.

    Args:
        flash: the attention kernel computes the scores again in its backward pass (FLASH_BACKWARD).
    """
    forward = forward_flops(shape, setup.length, setup.group, causal=causal, wraps=wraps).times(setup.batch_size)
    if not setup.is_full:
        weights = 2.0 * setup.batch_size * setup.length * shape.lora_weights(setup.lora_r)
        forward = dataclasses.replace(forward, adapters=weights)
    return TrainingFlops(
        forward=forward,
        sweep=dataclasses.replace(forward, head=0.0).times(setup.swept_tokens / setup.length),
        recompute=_recomputed(shape, setup, forward),
        backward=_backward(shape, setup, forward, FLASH_BACKWARD if flash else PLAIN_BACKWARD),
    )


def again_of_layers(shape: ModelShape, setup: TrainingSetup) -> tuple[float, float]:
    """Return the shares of the layers that are computed again: by checkpointing, and by nested checkpoints besides."""
    if not setup.checkpointing:
        return 0.0, 0.0
    layers = shape.num_layers
    nested = layers - -(-layers // setup.nested)
    return -(-layers // setup.checkpoint_every) / layers, nested / layers


def _recomputed(shape: ModelShape, setup: TrainingSetup, forward: Flops) -> Flops:
    checkpointed, nested = again_of_layers(shape, setup)
    matrices = 3 if shape.layout.gated else 2
    again = 1.0 if shape.layout.post_norm else 0.0 if setup.tile else (matrices - 1) / matrices
    layers = dataclasses.replace(forward, head=0.0)
    tiled = Flops(mlp=forward.mlp if setup.tile else 0.0)
    return dataclasses.replace(layers, mlp=forward.mlp * again).times(checkpointed) + layers.times(nested) + tiled


def _backward(shape: ModelShape, setup: TrainingSetup, forward: Flops, attention: float) -> Flops:
    per_matrix = 2.0 if setup.is_full else 1.0
    head = 2.0 if setup.is_full or (shape.tied and setup.trains_embeddings) else 1.0
    is_cut = not (setup.trains_embeddings or setup.checkpointing)  # the first layer's input needs no gradient
    tokens = 2.0 * setup.batch_size * setup.length
    unused = tokens * shape.hidden_size * (shape.query_size + 2 * shape.kv_size) if is_cut else 0.0
    unused_mlp = tokens * shape.mlp_weights if is_cut and shape.layout.parallel else 0.0
    return Flops(
        projections=forward.projections * per_matrix - unused,
        attention=forward.attention * attention,
        mlp=forward.mlp * per_matrix - unused_mlp,
        head=forward.head * head,
        adapters=forward.adapters * 2.0,
    )
