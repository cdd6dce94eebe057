"""`longext finetune`: extend a checkpoint and train it at its new length, as LongLoRA (arXiv 2309.12307) does.

S2-Attn or full attention in training, LoRA with trainable embeddings and norms, full attention in every evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.attention.bands import REMAPS
from longext.attention.chunks import KeyValueStore
from longext.attention.sequence import check_heads
from longext.attention.variant import ATTENTION_VARIANTS
from longext.checkpoint.checks import check_token_cache, embedding_rows
from longext.checkpoint.load import load_tokenizer
from longext.checkpoint.source import HUB_ID, text_of
from longext.checkpoint.tying import untied
from longext.checkpoint.weights import main_dtype, read_shards
from longext.conversion.adapter_base import describe_adapter, write_base
from longext.data.long_short import LARGEST_WEIGHT, long_short, longce_weights, short_context, short_step
from longext.data.packing import Windows
from longext.data.rows import open_rows
from longext.errors import ConfigError, TrainingError
from longext.models.batching import kv_numbers
from longext.models.head import head_is_plain
from longext.models.hf import HFLanguageModel
from longext.models.remap import attach
from longext.processes.group import is_main_process, is_sharded, main_process_first, wait_for_all
from longext.rope.spec import methods_that
from longext.training.config import LONGCE, FinetuneConfig
from longext.training.engine import AttentionEngine, Engine
from longext.training.first_loss import check_first_loss
from longext.training.layers.kernels import Kernels, choose_kernels, use_compile, use_liger
from longext.training.layers.tiles import check_token_wise, token_wise_modules, use_tiles
from longext.training.layers.windows import rotated_by_document
from longext.training.loading import (
    Extension,
    attention_of,
    enable_checkpointing,
    full_attention,
    load_for_training,
    narrow_hidden_states,
    plan_training_rope,
    training_device,
    uses_autocast,
)
from longext.training.losses import chunk_for, chunked_loss
from longext.training.run import Run, RunPlan, TrainingResult, train
from longext.training.settings import DECIDING_FINETUNE, check_finetune_config, fingerprint, world_size
from longext.training.sweep import chunk_tokens
from longext.training.tuning import Trainable, make_trainable
from longext.untrusted import note

SHORT_SHARE = 0.3  # of the rows of mixed windows: arXiv 2502.20082 trains on 3 B short tokens of 10 B


@dataclass(frozen=True, kw_only=True)
class FinetunePlan(RunPlan):
    """A fine-tuning run that was checked.

    Attributes:
        extension: the RoPE it trains for.
    """

    config: FinetuneConfig
    extension: Extension

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the RoPE that is trained comes from."""
        return self.extension.record

    @property
    def group_size(self) -> int:
        """G of S2-Attn: constant for the run."""
        return self.config.group_size or max(2, round(self.row_length * self.config.group_ratio))

    @property
    def windows(self) -> Windows | None:
        """The rows of a run with mixed windows."""
        config = self.config
        if not config.mixed_window:
            return None
        usual = 0.0 if config.task == "sft" else SHORT_SHARE
        return Windows(self.extension.trained_length, usual if config.short_share is None else config.short_share)

    @property
    def short_context(self) -> int | None:
        """Tokens that LongCE's short windows have in view; None for a plain loss."""
        config = self.config
        return short_context(self.row_length, config.short_context) if config.loss == LONGCE else None

    @property
    def chunk(self) -> int | None:
        """Tokens of a chunk of the sweep, None if a row is one graph."""
        group = None if attention_of(self.config) == "full" else self.group_size
        return chunk_tokens(self.config.sweep, self.row_length, group)

    @property
    def kernels(self) -> str | None:
        """Which kernels of norms, RoPE and MLPs the run uses: "liger", "compile" or None."""
        device = training_device(self.config)
        return choose_kernels(self.config.kernels, str(self.extension.config["model_type"]), device, is_sharded())

    def load_tokenizer(self) -> Any:
        """Return the tokenizer of the base model."""
        return load_tokenizer(self.source, self.config.trust_remote_code or None)

    def open_rows(self, tokenizer: Any, on_tokens: Callable[[int], None] | None = None) -> Any:
        """Return the rows of the whole run; the main process tokenises, the others then find its cache."""
        resolved = dataclasses.replace(self.config, target_length=self.extension.target_length)
        with main_process_first():
            rows = open_rows(
                resolved, tokenizer, length=self.row_length, num_rows=self.num_rows, windows=self.windows,
                on_progress=on_tokens,
            )  # fmt: skip
        text = self.extension.config.get("text_config", self.extension.config)
        check_token_cache(rows.cache, text.get("vocab_size"), tokenizer, str(self.config.data))
        return rows

    def fingerprint(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return what decides the numbers of the run on data of this report."""
        config, extension = self.config, self.extension
        settings = {
            **{name: getattr(config, name) for name in DECIDING_FINETUNE},
            "attention": attention_of(config),
            "sweep": self.chunk,
            "kernels": self.kernels,
            **({"loss": config.loss, "short_context": self.short_context} if self.short_context else {}),
        }
        weights = extension.record["base_weights"]
        return fingerprint(config, settings, extension.config, weights, data["tokens_sha256"], world_size(config))

    def load(self, directory: Path, on_tokens: Callable[[int], None] | None = None) -> FinetuneRun:
        """Load model and rows; the model stays where it was loaded: Trainer, which knows about sharding, moves it."""
        from transformers import set_seed

        config = self.config
        if config.method != "none" and is_main_process():
            for told in self.extension.record.get("warnings", ()):
                note(told)
        set_seed(config.seed)
        base, tokenizer = load_for_training(config, self.extension)
        rows = self.open_rows(tokenizer, on_tokens)
        check_token_cache(rows.cache, embedding_rows(base), tokenizer, str(config.data))
        return self.prepare(base, tokenizer, rows, directory)

    def prepare(self, base: Any, tokenizer: Any, rows: Any, directory: Path) -> FinetuneRun:
        """Make a loaded model what the config trains: adapters, narrow hidden states, checkpointed layers.

        Args:
            base: a causal LM under the attention implementation to train with (`loading.implementation_of`).
            tokenizer: of the model; needed to save the run alone.
            rows: row i of the run at index i, and `report`, what run.json says of the data.
            directory: the run's working directory.
        """
        config = self.config
        is_hub_id = HUB_ID.match(config.model) and not Path(config.model).expanduser().exists()
        names = token_wise_modules(base)
        if config.tile is not None:
            check_token_wise(base, names)
        kernels = use_liger(base) if self.kernels == "liger" else Kernels()  # PEFT copies the norms as they are then
        model, trainable = make_trainable(base, config, config.model if is_hub_id else str(self.source.resolve()))
        base = model.get_base_model() if model is not base else base
        narrow_hidden_states(base)
        if self.kernels == "compile":
            kernels = use_compile(base, names)
        if config.tile is not None:
            use_tiles(base, names, config.tile)
        if config.checkpointing:
            enable_checkpointing(base, config.offload, every=config.checkpoint_every, nested=config.nested)
        return FinetuneRun(
            plan=self, directory=directory, model=model, tokenizer=tokenizer, rows=rows,
            device=training_device(config), base=base, trainable=trainable, kernels=kernels,
        )  # fmt: skip


def plan_finetune(config: FinetuneConfig) -> FinetunePlan:
    """Check a run, from config files alone.

    Raises:
        ConfigError: values out of range, or a combination that cannot run.
        CheckpointError: the model cannot be read.
    """
    check_finetune_config(config)
    extension = plan_training_rope(config)
    length = config.window or extension.target_length  # of a row: the PoSE window, or the whole target length
    if config.sequence_parallel > 1:
        _check_sequence_parallel(config, extension, length)
    _check_rope(config, extension)
    _check_router_loss(extension)
    plan = FinetunePlan(config=config, source=extension.source, row_length=length, extension=extension)
    if plan.short_context is not None and plan.short_context + short_step(plan.short_context) >= length:
        raise ConfigError(
            f"--short-context {plan.short_context} leaves no far text in rows of {length} tokens: give at most "
            f"{max(1, length // 2)}."
        )
    _ = plan.kernels  # refused now if it is
    return plan


def finetune_checkpoint(config: FinetuneConfig, directory: Path, **settings: Any) -> TrainingResult:
    """Check and train a run, and write the adapter (with tuning "full" the checkpoint) into `directory`.

    Args:
        settings: as for `training.run.train`, whose errors it raises besides those of `plan_finetune`.
    """
    return train(plan_finetune(config), directory, **settings)


def _check_sequence_parallel(config: FinetuneConfig, extension: Extension, length: int) -> None:
    if length % config.sequence_parallel:
        raise ConfigError(
            f"--sequence-parallel {config.sequence_parallel} must divide the row length {length}: choose a "
            "--target-length that is a multiple of it."
        )
    text = extension.config.get("text_config", extension.config)
    check_heads(int(text["num_attention_heads"]), config.sequence_parallel)


def _check_router_loss(extension: Extension) -> None:
    """Refuse a model whose config adds a loss for its router: the loss that is trained is of the next token alone."""
    if extension.config.get("text_config", extension.config).get("output_router_logits"):
        raise ConfigError(
            "config.json of this model has output_router_logits true, which adds a loss for balanced experts, and "
            "longext trains on the next token alone: set it to false in a copy of the model."
        )


def _check_rope(config: FinetuneConfig, extension: Extension) -> None:
    """Refuse to train a length-dependent RoPE if the sequence that it sees is not the one it will see in use."""
    if not extension.follows_length:
        return
    for flag, is_on in (
        ("--sequence-parallel", config.sequence_parallel > 1),
        ("--positions pose", config.positions == "pose"),
        ("--task sft", config.task == "sft" and not config.mixed_window),
    ):
        if is_on:
            raise ConfigError(
                f"{flag} cannot train {extension.rope_type} RoPE: it depends on the length of the sequence, and the "
                "rows here are not what the model will see in use. Choose one of "
                f"{methods_that(lambda method: not method.follows_length)}."
            )


@dataclass(kw_only=True)
class FinetuneRun(Run):
    """A loaded fine-tuning run.

    Attributes:
        base: the causal LM inside `model` (the same for full tuning).
        trainable: what is trained.
        kernels: of norms, RoPE and MLPs.
        first_loss: what was found before the first step (`check_first_loss`); None until then.
    """

    plan: FinetunePlan
    base: Any
    trainable: Trainable
    kernels: Kernels
    first_loss: dict[str, Any] | None = None

    @property
    def autocast(self) -> bool:
        """True if matrix products run in bfloat16."""
        return uses_autocast(self.plan.config, self.device)

    @property
    def is_full(self) -> bool:
        """True if every weight is trained, and there is no adapter."""
        return self.model is self.base

    def make_engine(self, **settings: Any) -> AttentionEngine:
        """Return the engine, which gives every batch its attention plan."""
        config = self.plan.config
        return AttentionEngine(
            model=self.model,
            group_size=self.plan.group_size,
            backend=config.backend,
            separate_documents=config.separate_documents or config.task == "sft" or config.mixed_window,
            describe=None if self.is_full else functools.partial(self.describe, state="checkpoint"),
            chunk=self.plan.chunk,
            new_store=functools.partial(self.new_store, config.kv_memory),
            weigh=self.weigh if self.plan.short_context else None,
            **settings,
        )

    @property
    def scorer(self) -> HFLanguageModel:
        """The model in training, as evaluations see it."""
        plan = self.plan
        return HFLanguageModel(plan.config.model, self.base, self.tokenizer, plan.extension.config, plan.source)

    def weigh(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the weights of LongCE [B, N] of rows int64 [B, N], aligned with shifted labels.

        Both losses are those of the model as it is used: in eval mode, under full attention, whatever it trains under.
        """
        scorer, context = self.scorer, self.plan.short_context
        assert context is not None
        with full_attention(self.base, tokens.device, self.autocast):
            gain, _ = long_short(lambda ids, first: scorer.score(ids, first).nll, tokens, context, short_step(context))
        return torch.nn.functional.pad(longce_weights(gain), (0, 1), value=1.0)

    def new_store(self, gib: float | None) -> KeyValueStore:
        """Return where the keys and values of a swept batch wait, and their gradients.

        On a CPU there is one memory. On a GPU, attention within groups leaves half a group of a chunk to the next one:
        little, but of every chunk, so it waits in host memory and GPU memory does not grow with the row. Under full
        attention every later chunk reads all of it, and adds to its gradient: both stay on the GPU as far as there is
        room. Keys and values come first: a byte of them is read three times a chunk, one of a gradient is read and
        written once.

        Args:
            gib: of GPU memory for them, None for half of what is free.
        """
        if self.device.type != "cuda":
            return KeyValueStore()
        variant = ATTENTION_VARIANTS[attention_of(self.plan.config)]
        if variant.lower.first is not None and variant.upper.first is not None:
            return KeyValueStore(room=0)
        room = torch.cuda.mem_get_info(self.device)[0] / 2 if gib is None else gib * 2**30
        tokens = self.plan.row_length * self.plan.config.batch_size
        wanted = kv_numbers(self.base.config.get_text_config()) * tokens * (2 if self.autocast else 4)
        return KeyValueStore(room=room, gradient_room=max(0.0, room - wanted))

    @property
    def loss_chunk(self) -> int:
        """Tokens whose logits exist at once."""
        return self.plan.config.loss_chunk or chunk_for(embedding_rows(self.base))

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Use the run's kernels, and the chunked loss if it gives the model's own (checked on a few tokens).

        Raises:
            TrainingError: the RoPE is wrong (`check_first_loss`).
            ConfigError: a sweep of a model whose own code has to make its loss.
        """
        from peft.helpers import disable_input_dtype_casting

        config, extension = self.plan.config, self.plan.extension
        # autocast narrows what adapters read: peft would widen it to their float32 first, only for that
        windows = self.plan.windows
        by_document = rotated_by_document(self.base, windows.length) if windows else contextlib.nullcontext()
        unwidened = disable_input_dtype_casting(self.model, active=self.autocast and not self.is_full)
        with self.kernels.in_place(), unwidened, by_document:
            # before training the model may still be on the CPU, from which FSDP and DeepSpeed take it
            with full_attention(self.base, self.base.device, self.autocast):
                is_plain = head_is_plain(self.base)
                own = "--sweep" if self.plan.chunk is not None else "--loss longce" if self.plan.short_context else ""
                if not is_plain and own:
                    raise ConfigError(
                        f"{own} makes losses from logits, and longext does not know how {type(self.base).__name__} "
                        f"makes its own: leave {own} out."
                    )
                method = "none" if extension.remap else config.method
                self.first_loss = check_first_loss(self.scorer, method, extension, self.rows[0])
            with self._remapped(), chunked_loss(self.base, self.loss_chunk) if is_plain else contextlib.nullcontext():
                yield

    def _remapped(self) -> contextlib.AbstractContextManager[Any]:
        """Put the model under the run's remapping of positions, if it has one, until it is left."""
        remap = self.plan.extension.remap
        if remap is None:
            return contextlib.nullcontext()
        return attach(
            self.base, remap.name, self.plan.extension.target_length,
            original_length=remap.original_length, **remap.parameters,
        )  # fmt: skip

    @property
    def _remapped_as(self) -> str:
        """What of the objective the remapping is, in words."""
        remap = self.plan.extension.remap
        return f", distances of {remap.name}: {REMAPS[remap.name].formula}" if remap else ""

    def record(self, seconds: float, metrics: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Return the "finetune" part of run.json."""
        plan, config = self.plan, self.plan.config
        attention, seen = (
            attention_of(config),
            sorted({line["attention"] for line in metrics or () if "attention" in line}),
        )
        group = "" if attention == "full" else f" in groups of {plan.group_size:,}"
        unmeasured = "full" if metrics is None else "full (nothing was measured)"
        return {
            "tuning": dataclasses.asdict(self.trainable),
            "attention": {
                "training": attention,
                "objective": f"{attention} attention{group}{self._remapped_as}",
                "definition": ATTENTION_VARIANTS[attention].summary,
                "group_size": plan.group_size if attention != "full" else None,
                "evaluation": ", ".join(seen) or unmeasured,
            },
            **self._weighed,
            "sweep": plan.chunk,
            "row_length": plan.row_length,
            "target_length": plan.extension.target_length,
            "trained_length": plan.extension.trained_length,
            "positions": config.positions,
            **({"windows": dataclasses.asdict(plan.windows)} if plan.windows else {}),
            "kernels": self.kernels.name,
            "memory": self._memory(),
            "data": self.rows.report,
            "rows_per_step": plan.rows_per_step,
            "num_tokens": plan.num_tokens,
            **({"first_loss": self.first_loss} if self.first_loss else {}),
            **self.cost(seconds),
        }

    @property
    def _weighed(self) -> dict[str, Any]:
        """Return how LongCE weighs tokens; nothing for a plain loss."""
        context = self.plan.short_context
        if context is None:
            return {}
        facts = {"name": LONGCE, "definition": f"min(exp(short loss - whole loss), {LARGEST_WEIGHT:g}) times the loss"}
        return {"loss": {**facts, "short_context": context, "step": short_step(context)}}

    def _memory(self) -> dict[str, Any]:
        """Return what is kept of a step, and in which pieces it is computed."""
        config = self.plan.config
        return {
            "checkpointing": config.checkpointing,
            **{name: getattr(config, name) for name in ("checkpoint_every", "nested", "offload", "tile")},
            "loss_chunk": self.loss_chunk,
        }

    def model_config(self) -> dict[str, Any]:
        """Return config.json of what was trained: RoPE in both spellings, whether its ends are tied by fact."""
        written = {**self.plan.extension.config, "use_cache": True}
        return written if self.base.config.get_text_config().tie_word_embeddings else untied(written)

    def describe(self, directory: Path, state: str) -> None:
        """Write next to an adapter of this run the RoPE and the base that it belongs to."""
        config, output = self.plan.config, Path(self.plan.config.output or self.directory)
        describe_adapter(directory, output, "finetune", config, self.model_config(), self.plan.extension.record, state)

    def save(self, engine: Engine) -> None:
        """Write adapter or model, config.json with the RoPE in both spellings, and the tokenizer files.

        Raises:
            TrainingError: the written adapter is empty (what sharded training can do to one).
        """
        dtype = self._saved_dtype()
        if self.is_full:
            state = engine.accelerator.get_state_dict(engine.model_wrapped)
            if is_main_process():
                self.base.save_pretrained(self.directory, state_dict=_cast(state, dtype))
        else:
            engine.save_model(str(self.directory))
        wait_for_all()
        if not is_main_process():
            return
        for name in ("training_args.bin", "README.md"):
            (self.directory / name).unlink(missing_ok=True)
        if self.is_full:
            config = {**self.model_config(), "dtype": str(dtype).removeprefix("torch.")}
            config.pop("torch_dtype", None)
            (self.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            read_shards(self.directory)
        else:
            self.describe(self.directory, state="running")
            write_base(self.directory, self.plan.source, self.model_config())
            _check_adapter(self.directory)
        self.tokenizer.save_pretrained(self.directory)

    def _saved_dtype(self) -> torch.dtype:
        """Return the dtype of a fully trained checkpoint: as asked, else the base's own."""
        name = self.plan.config.save_dtype
        if name == "auto":
            sections = (self.plan.extension.config, text_of(self.plan.extension.config))
            said = [section.get(key) for section in sections for key in ("dtype", "torch_dtype")]
            name = str(next(filter(None, said), None) or main_dtype(self.plan.source))
        dtype: torch.dtype = getattr(torch, name)
        return dtype


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors in `dtype`; those that share memory (tied embeddings) go on sharing it."""
    converted: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for x in state.values():
        converted.setdefault((x.data_ptr(), x.shape), x.to(dtype) if x.is_floating_point() else x)
    return {name: converted[x.data_ptr(), x.shape] for name, x in state.items()}


def _check_adapter(directory: Path) -> None:
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "lora_B" in name]  # noqa: SIM118
        if not names or not any(bool(file.get_tensor(name).any()) for name in names):
            raise TrainingError(
                f"The adapter in {directory} is empty: nothing was learned or it was not gathered from all "
                "processes. The last checkpoint is kept; do not use this adapter."
            )
