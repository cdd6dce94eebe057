"""One training run as the closed forms see it: what is trained, how, on how many GPUs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from longext.errors import ConfigError
from longext.planning.config import DTYPES, PlanConfig
from longext.planning.shape import ModelShape
from longext.settings import check_names

AUTO = 0  # of `TrainingSetup.sweep`: the least number of groups with 8,192 tokens; under full attention those
SWEPT = 8192  # tokens of a chunk that is chosen, at least
_LOGITS = 2**29  # bytes of float32 logits that a chunk of the loss may have, if nothing is said
_LOSS_TOKENS = (128, 4096)


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """A training run, as far as it costs memory and time; what `PlanConfig` has too means the same here.

    Attributes:
        method: longlora (LoRA, embeddings and norms), lora or full.
        attention: s2 (half of the heads in groups, half in groups shifted by half a group) or full.
        checkpoint_every: only every so many-th layer is checkpointed, the others keep all that autograd does.
        nested: hidden states are kept for one of so many layers, and those between are computed again.
        loss_chunk: tokens whose logits exist at once; None for all of them.
        sweep: tokens of a row whose graph exists at once, AUTO, or None for the whole row.
        kv_memory: GiB of earlier keys and values (and their gradients) that a sweep under full attention keeps on the
            GPU, the rest in host memory; None for all of them.
        tile: tokens that the MLP, and the norms and projections, work on at once; None for all.
        kernels: liger (fused norms, RoPE and MLP activation) or none.
        sharding: none or ddp (replicas), zero2 (gradients and optimiser divided), fsdp (weights too).
        num_gpus: GPUs in all.
        compute_bytes: bytes of an activation and of a frozen weight (2 under bf16 autocast, 4 for plain float32).
        hidden_bytes: bytes of an element of the hidden states between layers; None for what autocast makes them.
        norm_bytes: bytes of an element that a norm puts out; None for `compute_bytes`. With 4 it is what trained norms
            put out before the engine narrowed them.
        tiles_norms: False if tiles are of the MLP alone.
    """

    length: int
    batch_size: int = 1
    method: str = "longlora"
    attention: str = "s2"
    group_size: int | None = None
    group_ratio: float = 0.25
    lora_r: int = 8
    checkpointing: bool = True
    checkpoint_every: int = 1
    nested: int = 1
    loss_chunk: int | None = 4096
    offload: bool = False
    sweep: int | None = None
    kv_memory: float | None = None
    tile: int | None = None
    kernels: str = "none"
    sharding: str = "none"
    num_gpus: int = 1
    sequence_parallel: int = 1
    compute_bytes: int = 2
    hidden_bytes: int | None = None
    norm_bytes: int | None = None
    tiles_norms: bool = True

    @property
    def group(self) -> int | None:
        """Tokens of an S2 group, None under full attention."""
        if self.attention != "s2":
            return None
        return self.group_size or max(2, round(self.length * self.group_ratio))

    @property
    def chunk(self) -> int | None:
        """Tokens of a row whose graph exists at once, AUTO worked out; None if the row is not swept, or one chunk."""
        if self.sweep is None:
            return None
        unit = self.group or 1
        chunk = self.sweep or unit * -(-SWEPT // unit)
        return chunk if chunk < self.length else None

    @property
    def is_full(self) -> bool:
        """True if every parameter is trained."""
        return self.method == "full"

    @property
    def trains_embeddings(self) -> bool:
        """True if embeddings and norms are trained."""
        return self.method != "lora"

    @property
    def has_fused_kernels(self) -> bool:
        """True if norms, RoPE and the MLP's activation are one kernel each."""
        return self.kernels == "liger"

    @property
    def local_tokens(self) -> int:
        """Tokens of one micro-batch whose activations one GPU holds at once."""
        return self.batch_size * -(-(self.chunk or self.length) // self.sequence_parallel)

    @property
    def swept_tokens(self) -> int:
        """Tokens of a sequence that a sweep goes over twice, all but its last chunk's; 0 without a sweep."""
        return 0 if self.chunk is None else self.length - (self.length - 1) % self.chunk - 1

    @property
    def sequences_at_once(self) -> int:
        """Sequences that all GPUs together train on in one micro-batch."""
        return self.batch_size * (self.num_gpus // self.sequence_parallel)

    @property
    def tokens_at_once(self) -> int:
        """Tokens that all GPUs together train on in one micro-batch."""
        return self.sequences_at_once * self.length

    @property
    def chunk_tokens(self) -> int:
        """Tokens whose logits exist at once on one GPU."""
        return min(self.local_tokens, self.loss_chunk or self.local_tokens)

    @property
    def chunks_loss(self) -> bool:
        """True if the loss is computed in more than one piece."""
        return self.chunk_tokens < self.local_tokens

    def trainable(self, shape: ModelShape) -> int:
        """Return the number of trained parameters."""
        if self.is_full:
            return shape.num_parameters
        extra = shape.head_weights + shape.norm_weights if self.trains_embeddings else 0
        return shape.lora_weights(self.lora_r) + extra


def setup_of(config: PlanConfig, num_gpus: int, shape: ModelShape) -> TrainingSetup:
    """Return the setup that `config` describes (sharding "auto" is left for the search to decide).

    Raises:
        ConfigError: an unknown method, attention, sharding or dtype; a group or a division that cannot be.
    """
    check_names(config)
    attention = config.attention or ("s2" if config.method == "longlora" else "full")
    _check(config, num_gpus, shape)
    shared = {field.name for field in dataclasses.fields(TrainingSetup)} & set(vars(config))
    same = {name: getattr(config, name) for name in shared - {"attention", "sweep", "kernels", "loss_chunk"}}
    return TrainingSetup(
        **same,
        attention=attention,
        sweep=_sweep(config.sweep),
        kernels="liger" if config.kernels == "liger" else "none",
        loss_chunk=config.loss_chunk or loss_tokens(shape.vocab_size),
        num_gpus=num_gpus,
        compute_bytes=DTYPES[config.dtype],
    )


def _check(config: PlanConfig, num_gpus: int, shape: ModelShape) -> None:
    if config.offload and not config.checkpointing:
        raise ConfigError("--offload moves what checkpointing keeps; it cannot go with --no-checkpointing.")
    if not config.checkpointing and (config.nested > 1 or config.checkpoint_every > 1):
        raise ConfigError("--nested and --checkpoint-every say how to checkpoint; leave --no-checkpointing out.")
    if config.nested > 1 and config.checkpoint_every > 1:
        raise ConfigError("--nested keeps fewer layer inputs, --checkpoint-every more than those; give one of them.")
    if not 0 < config.group_ratio <= 1:
        raise ConfigError(f"`group_ratio` must be in (0, 1], got {config.group_ratio:g}.")
    if config.group_size is not None and config.group_size % 2:
        raise ConfigError(f"`group_size` must be even (groups shift by half of it), got {config.group_size}.")
    if num_gpus % config.sequence_parallel:
        raise ConfigError(
            f"`sequence_parallel` {config.sequence_parallel} must divide the {num_gpus} GPU(s) of --gpus."
        )
    if shape.num_heads % config.sequence_parallel:
        raise ConfigError(
            f"`sequence_parallel` {config.sequence_parallel} must divide the model's {shape.num_heads} attention heads."
        )
    if config.sequence_parallel > 1 and config.sweep != "off":
        raise ConfigError("--sweep takes a row in pieces on one GPU, --sequence-parallel on several; give one of them.")
    if config.sharding not in ("auto", "none") and num_gpus == 1:
        raise ConfigError(f"`sharding` {config.sharding} needs several GPUs; --gpus names one. Use none or auto.")


def _sweep(text: str) -> int | None:
    """Return the chunk that `--sweep` names: tokens, AUTO or None."""
    if text in ("off", "auto"):
        return None if text == "off" else AUTO
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and int(text) > 0):
        raise ConfigError(f"`sweep` must be a number of tokens, auto or off, got '{text}'.")
    return int(text)


def loss_tokens(vocab_size: int) -> int:
    """Return how many tokens' logits exist at once if nothing is said: what 512 MiB hold in float32, 128 to 4,096."""
    least, most = _LOSS_TOKENS
    return max(least, min(most, _LOGITS // (4 * vocab_size) // least * least))
