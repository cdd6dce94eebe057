"""One training run as the closed forms see it: what is trained, how, on how many GPUs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from longext.errors import ConfigError
from longext.planning.config import DTYPES, PlanConfig
from longext.planning.shape import ModelShape
from longext.settings import check_names


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """A training run, as far as it costs memory and time; what `PlanConfig` has too means the same here.

    Attributes:
        method: longlora (LoRA, embeddings and norms), lora or full.
        attention: s2 (half of the heads in groups, half in groups shifted by half a group) or full.
        loss_chunk: tokens whose logits exist at once; None for all of them.
        sharding: none or ddp (replicas), zero2 (gradients and optimiser divided), fsdp (weights too).
        num_gpus: GPUs in all.
        compute_bytes: bytes of an activation and of a frozen weight (2 under bf16 autocast, 4 for plain float32).
        hidden_bytes: bytes of an element of the hidden states between layers; None for what autocast makes them.
    """

    length: int
    batch_size: int = 1
    method: str = "longlora"
    attention: str = "s2"
    group_size: int | None = None
    group_ratio: float = 0.25
    lora_r: int = 8
    checkpointing: bool = True
    loss_chunk: int | None = 4096
    offload: bool = False
    sharding: str = "none"
    num_gpus: int = 1
    sequence_parallel: int = 1
    compute_bytes: int = 2
    hidden_bytes: int | None = None

    @property
    def group(self) -> int | None:
        """Tokens of an S2 group, None under full attention."""
        if self.attention != "s2":
            return None
        return self.group_size or max(2, round(self.length * self.group_ratio))

    @property
    def is_full(self) -> bool:
        """True if every parameter is trained."""
        return self.method == "full"

    @property
    def trains_embeddings(self) -> bool:
        """True if embeddings and norms are trained."""
        return self.method != "lora"

    @property
    def local_tokens(self) -> int:
        """Tokens of one micro-batch that one GPU holds."""
        return self.batch_size * -(-self.length // self.sequence_parallel)

    @property
    def sequences_at_once(self) -> int:
        """Sequences that all GPUs together train on in one micro-batch."""
        return self.batch_size * (self.num_gpus // self.sequence_parallel)

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


def setup_of(config: PlanConfig, num_gpus: int) -> TrainingSetup:
    """Return the setup that `config` describes (sharding "auto" is left for the search to decide).

    Raises:
        ConfigError: an unknown method, attention, sharding or dtype; a group or a division that cannot be.
    """
    check_names(config)
    if config.offload and not config.checkpointing:
        raise ConfigError("--offload moves what checkpointing keeps; it cannot go with --no-checkpointing.")
    attention = config.attention or ("s2" if config.method == "longlora" else "full")
    if not 0 < config.group_ratio <= 1:
        raise ConfigError(f"`group_ratio` must be in (0, 1], got {config.group_ratio:g}.")
    if config.group_size is not None and config.group_size % 2:
        raise ConfigError(f"`group_size` must be even (groups shift by half of it), got {config.group_size}.")
    if num_gpus % config.sequence_parallel:
        raise ConfigError(
            f"`sequence_parallel` {config.sequence_parallel} must divide the {num_gpus} GPU(s) of --gpus."
        )
    if config.sharding not in ("auto", "none") and num_gpus == 1:
        raise ConfigError(f"`sharding` {config.sharding} needs several GPUs; --gpus names one. Use none or auto.")
    shared = {field.name for field in dataclasses.fields(TrainingSetup)} & set(vars(config))
    same = {name: getattr(config, name) for name in shared - {"attention"}}
    return TrainingSetup(**same, attention=attention, num_gpus=num_gpus, compute_bytes=DTYPES[config.dtype])
