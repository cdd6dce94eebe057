"""`longext finetune`: extend a checkpoint and train it at its new length, as LongLoRA (arXiv 2309.12307) does.

S2-Attn or full attention in training, LoRA with trainable embeddings and norms, full attention in every evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.attention.sequence import check_heads, make_sequence_group
from longext.attention.variant import ATTENTION_VARIANTS
from longext.checkpoint.checks import check_token_cache, embedding_rows
from longext.checkpoint.source import HUB_ID
from longext.checkpoint.tying import untied
from longext.checkpoint.weights import read_shards
from longext.conversion.adapter_base import describe_adapter, write_base
from longext.data.documents import load_documents
from longext.data.packing import collate_rows
from longext.data.rows import open_rows
from longext.errors import ConfigError, TrainingError, TrainingStopped
from longext.evals.perplexity import evaluate_perplexity, tokenize_documents
from longext.evals.suites.ppl import Perplexity
from longext.models.head import head_is_plain
from longext.models.hf import LENGTH_DEPENDENT, HFLanguageModel
from longext.options import DataConfig
from longext.rope.spec import methods_that
from longext.training.callbacks import METRICS_NAME, Evaluate, Metrics, Report, peak_memory, read_metrics
from longext.training.checkpoints import KEPT, check_fingerprint, last_whole_checkpoint, read_marker
from longext.training.config import FinetuneConfig, TrainingConfig
from longext.training.engine import AttentionEngine, Engine, Rows, StopOnSignal
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
from longext.training.losses import chunked_loss
from longext.training.processes import (
    agree,
    is_main_process,
    main_process_first,
    num_processes,
    wait_for_all,
)
from longext.training.settings import check_finetune_config, fingerprint_of, trainer_arguments, world_size
from longext.training.tuning import Trainable, make_trainable

CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """One fine-tuning run in this process: what it trains, on what, where it writes.

    Attributes:
        config: the resolved config.
        extension: the RoPE it trains for.
        directory: working directory (`<output>.running`); becomes the output when the run is done.
        model, base, tokenizer: the model to train, the causal LM inside it, its tokenizer.
        trainable: what is trained.
        rows: the training rows.
        device: of this process.
        notes: what the user should know of a run that is resumed.
    """

    config: FinetuneConfig
    extension: Extension
    directory: Path
    model: Any
    base: Any
    tokenizer: Any
    trainable: Trainable
    rows: Any
    device: torch.device
    notes: tuple[str, ...] = ()

    @property
    def row_length(self) -> int:
        """Tokens of a training row."""
        return row_length(self.config, self.extension)

    @property
    def group_size(self) -> int:
        """G of S2-Attn: constant for the run."""
        return self.config.group_size or max(2, round(self.row_length * self.config.group_ratio))

    @property
    def global_batch(self) -> int:
        """Rows of one optimiser step, all processes together."""
        return global_batch(self.config)


def row_length(config: FinetuneConfig, extension: Extension) -> int:
    """Return the tokens of a training row: the PoSE window, or the whole target length."""
    return config.window or extension.target_length


def global_batch(config: FinetuneConfig) -> int:
    """Return the rows of one optimiser step, all processes together."""
    shared = config.sequence_parallel * config.context_parallel
    return config.batch_size * config.accumulation * world_size(config) // shared


def num_tokens(config: FinetuneConfig, extension: Extension) -> int:
    """Return the tokens of the whole run."""
    return config.num_steps * global_batch(config) * row_length(config, extension)


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished run leaves behind.

    Attributes:
        directory: where the weights are.
        record: what was trained, on what, how (`run_record`).
        extension: the provenance of the RoPE.
        metrics: the lines of metrics.jsonl.
    """

    directory: Path
    record: dict[str, Any]
    extension: dict[str, Any]
    metrics: list[dict[str, Any]]


def finetune_checkpoint(
    config: FinetuneConfig,
    directory: Path,
    on_progress: Report | None = None,
    on_start: Callable[[Run], None] | None = None,
    on_tokens: Callable[[int], None] | None = None,
    prolonged: Path | None = None,
) -> FinetuneResult:
    """Train, and write the adapter (or, with `--tuning full`, the checkpoint) into `directory`.

    Args:
        directory: the run's working directory; holds checkpoints and metrics from the first step.
        on_progress: told about tokens done and the last loss.
        on_start: told about the run before its first step.
        on_tokens: told how many tokens are tokenised so far, where the data is not in the cache.
        prolonged: last checkpoint of a finished run, to go on from where `directory` has none.

    Raises:
        ConfigError, CheckpointError, DataError: something given cannot be used.
        TrainingError: the loss became NaN, or a signal stopped the run (a checkpoint is there).
    """
    check_finetune_config(config)
    run = prepare(config, directory, on_tokens)
    fingerprint = fingerprint_of(config, run.extension, run.rows.report, num_processes())
    beginning = find_start(config, directory / CHECKPOINTS, fingerprint, prolonged)
    run.notes = beginning.notes
    metrics = Metrics(
        directory / METRICS_NAME if is_main_process() else None, run.global_batch * run.row_length, on_progress
    )
    signals = StopOnSignal()
    engine = AttentionEngine(
        model=run.model,
        args=trainer_arguments(
            config,
            directory / CHECKPOINTS,
            run.device,
            uses_autocast(config, run.device),
            beginning.fingerprint["warmup_used"],
        ),
        data_collator=collate_rows,
        rows=Rows(run.rows, config.batch_size, config.sequence_parallel),
        group_size=run.group_size,
        backend=config.backend,
        separate_documents=config.separate_documents or config.task == "sft",
        sequence=make_sequence_group(config.sequence_parallel),
        fingerprint=beginning.fingerprint,
        keep_checkpoints=config.keep_checkpoints,
        describe=functools.partial(describe_trained, run, state="checkpoint") if run.model is not run.base else None,
        callbacks=[metrics, signals, *_evaluation(run, metrics)],
    )
    metrics.log = engine.log
    quiet_trainer(engine)
    if on_start:
        on_start(run)
    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    chunked = chunked_loss(run.base, config.loss_chunk) if head_is_plain_in(run) else contextlib.nullcontext()
    with signals, chunked:
        engine.train_from(beginning.checkpoint)
    raise_if_stopped(signals, engine, directory)
    save_trained(run, engine)
    record = run_record(run, time.perf_counter() - started)
    wait_for_all()
    lines = read_metrics(directory / METRICS_NAME) if is_main_process() else []
    seen = sorted({line["attention"] for line in lines if "attention" in line})
    record["attention"]["evaluation"] = ", ".join(seen) or "full (nothing was measured)"
    return FinetuneResult(directory, record, run.extension.record, lines)


def prepare(config: FinetuneConfig, directory: Path, on_tokens: Callable[[int], None] | None = None) -> Run:
    """Load everything a run needs: RoPE, model, trainable parameters, rows.

    The model stays where it was loaded; Trainer, which knows about sharding, puts it on the device.
    """
    extension = plan_training_rope(config)
    device = training_device(config)
    check_rows(config, extension)
    from transformers import set_seed

    set_seed(config.seed)
    base, tokenizer = load_for_training(config, extension)
    rows = open_training_rows(config, extension, tokenizer, on_tokens)
    check_token_cache(rows.cache, embedding_rows(base), tokenizer, str(config.data))
    is_hub_id = HUB_ID.match(config.model) and not Path(config.model).expanduser().exists()
    model, trainable = make_trainable(base, config, config.model if is_hub_id else str(extension.source.resolve()))
    base = model.get_base_model() if model is not base else base
    narrow_hidden_states(base)
    if config.checkpointing:
        enable_checkpointing(base, config.offload)
    return Run(config, extension, directory, model, base, tokenizer, trainable, rows, device)


def open_training_rows(
    config: FinetuneConfig, extension: Extension, tokenizer: Any, on_tokens: Callable[[int], None] | None = None
) -> Any:
    """Return the rows of the whole run; the main process tokenises, the others then find its cache."""
    resolved = dataclasses.replace(config, target_length=extension.target_length)
    length, num_rows = row_length(config, extension), config.num_steps * global_batch(config)
    with main_process_first():
        rows = open_rows(resolved, tokenizer, length=length, num_rows=num_rows, on_progress=on_tokens)
    text = extension.config.get("text_config", extension.config)
    check_token_cache(rows.cache, text.get("vocab_size"), tokenizer, str(config.data))
    return rows


def check_rows(config: FinetuneConfig, extension: Extension) -> None:
    """Raise ConfigError where rows of this length, or this RoPE, cannot be trained as asked; reads no weights."""
    if config.sequence_parallel > 1:
        _check_sequence_parallel(config, extension)
    _check_rope(config, extension)


def _check_sequence_parallel(config: FinetuneConfig, extension: Extension) -> None:
    length = row_length(config, extension)
    if length % config.sequence_parallel:
        raise ConfigError(
            f"--sequence-parallel {config.sequence_parallel} must divide the row length {length}: choose a "
            "--target-length that is a multiple of it."
        )
    text = extension.config.get("text_config", extension.config)
    check_heads(int(text["num_attention_heads"]), config.sequence_parallel)


def _check_rope(config: FinetuneConfig, extension: Extension) -> None:
    """Refuse to train a length-dependent RoPE where the sequence that it sees is not the one it will see in use."""
    if extension.rope_type not in LENGTH_DEPENDENT:
        return
    for flag, is_on in (
        ("--sequence-parallel", config.sequence_parallel > 1),
        ("--positions pose", config.positions == "pose"),
        ("--task sft", config.task == "sft"),
    ):
        if is_on:
            raise ConfigError(
                f"{flag} cannot train {extension.rope_type} RoPE: it depends on the length of the sequence, and the "
                "rows here are not what the model will see in use. Choose one of "
                f"{methods_that(lambda method: not method.follows_length)}."
            )


def head_is_plain_in(run: Run) -> bool:
    """True where the chunked loss gives the model's own loss (checked on a few tokens with full attention).

    Before training the model may still be on the CPU, where FSDP and DeepSpeed take it from.
    """
    with full_attention(run.base, run.base.device, uses_autocast(run.config, run.device)):
        return head_is_plain(run.base)


def _evaluation(run: Run, metrics: Metrics) -> list[Evaluate]:
    """Return the callback that measures perplexity by length, where evaluation data was given."""
    config = run.config
    if config.eval_data is None:
        return []
    lengths = config.eval_lengths or default_lengths(run.extension)
    request = Perplexity(
        model=config.model,
        data=config.eval_data,
        text_field=config.text_field,
        split=config.eval_split,
        max_documents=config.eval_documents,
        max_tokens=max(lengths),
        lengths=lengths,
        # enough windows for a mean, not hundreds of long ones
        stride=max(1, min(max(min(lengths) // 2, max(lengths) // 16), min(lengths) - 1)),
        num_bootstrap=0,
    )
    scorer = HFLanguageModel(config.model, run.base, run.tokenizer, run.extension.config, run.extension.source)
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    source = DataConfig(**{name: getattr(request, name) for name in fields})
    documents, _ = tokenize_documents(scorer, load_documents(source), request)

    def evaluate(step: int) -> None:
        with full_attention(run.base, run.device, uses_autocast(config, run.device)):
            seen = str(scorer.describe()["attention"])
            results = evaluate_perplexity(scorer, documents, request)
        metrics.evaluation(step, {result.length: result.ppl for result in results}, attention=seen)

    return [Evaluate(evaluate, config.eval_every)]


def default_lengths(extension: Extension) -> tuple[int, ...]:
    """Return the trained length, its doublings below the target, and the target."""
    lengths = [extension.trained_length]
    while lengths[-1] * 2 < extension.target_length:
        lengths.append(lengths[-1] * 2)
    return tuple(
        sorted({length for length in [*lengths, extension.target_length] if length <= extension.target_length})
    )


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: from which it goes on; None for a new run, and for one that stopped before its first checkpoint.
        fingerprint: its own, with what it keeps of the checkpoint's.
        notes: what the user should know: damaged checkpoints that were passed over, what a longer run keeps.
    """

    checkpoint: Path | None
    fingerprint: dict[str, Any]
    notes: tuple[str, ...] = ()


def find_start(
    config: TrainingConfig, directory: Path, fingerprint: dict[str, Any], prolonged: Path | None = None
) -> Beginning:
    """Return where the run begins: all processes agree on that and on everything that decides the numbers.

    Nothing is deleted.

    Args:
        directory: checkpoints of the run.
        prolonged: last checkpoint of a finished run, to go on from where `directory` has none.

    Raises:
        ConfigError: the last whole checkpoint belongs to another run, none is whole, or the processes disagree.
    """
    found, damage = _find_checkpoint(config, directory, prolonged, contents=True)
    compared = {key: value for key, value in fingerprint.items() if key not in KEPT}
    agree({"the checkpoint to resume": found.name if found else "none", **compared, "num_steps": config.num_steps})
    if found is None:
        return Beginning(None, fingerprint)
    fingerprint = check_fingerprint(found, fingerprint)
    passed_over = [f"Passed over {text}. The run goes on from {found.name}." for text in damage]
    return Beginning(found, fingerprint, (*passed_over, *_changes(found, fingerprint)))


def _find_checkpoint(
    config: TrainingConfig, directory: Path, prolonged: Path | None, *, contents: bool
) -> tuple[Path | None, list[str]]:
    if not config.resume:
        return None, []
    found, damage = last_whole_checkpoint(directory, contents=contents)
    if found is None and prolonged is not None:
        return last_whole_checkpoint(prolonged.parent, contents=contents)
    return found, damage


def check_resume(
    config: TrainingConfig, directory: Path, fingerprint: dict[str, Any], prolonged: Path | None = None
) -> None:
    """Raise ConfigError where the last checkpoint is another run's: what `find_start` finds, before processes start."""
    found, _ = _find_checkpoint(config, directory, prolonged, contents=False)
    if found is not None:
        check_fingerprint(found, fingerprint)


def _changes(checkpoint: Path, fingerprint: dict[str, Any]) -> list[str]:
    """Return what a run that is prolonged or cut short should know, in a sentence."""
    before, now = read_marker(checkpoint)["fingerprint"]["last_step"], fingerprint["last_step"]
    if before == now:
        return []
    warmup = fingerprint["warmup_used"]
    return [
        f"The run was begun for {before} steps and goes on from {checkpoint.name} to step {now}. Its warm-up stays "
        f"{warmup} step{'' if warmup == 1 else 's'}; the learning rate is constant after it."
    ]


def raise_if_stopped(signals: StopOnSignal, engine: Engine, directory: Path) -> None:
    """Raise TrainingStopped where a signal ended the run before its last step."""
    done, wanted = engine.state.global_step, engine.state.max_steps
    if signals.received and done < wanted:
        name = signal.Signals(signals.received).name
        raise TrainingStopped(
            f"stopped by {name} after step {done} of {wanted}; a checkpoint is in {directory / CHECKPOINTS}. "
            "Run the same command with --resume to go on.",
            signals.received,
        )


def quiet_trainer(engine: Engine) -> None:
    """Take away the printing and bars of transformers: longext shows its own."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        engine.remove_callback(callback)


def save_trained(run: Run, engine: Engine) -> None:
    """Write adapter or model, config.json with the RoPE in both spellings, and the tokenizer files.

    Raises:
        TrainingError: the written adapter is empty (what sharded training can do to one).
    """
    dtype = _saved_dtype(run)
    if run.model is run.base:
        state = engine.accelerator.get_state_dict(engine.model_wrapped)
        if is_main_process():
            run.base.save_pretrained(run.directory, state_dict=_cast(state, dtype))
    else:
        engine.save_model(str(run.directory))
    wait_for_all()
    if not is_main_process():
        return
    for name in ("training_args.bin", "README.md"):
        (run.directory / name).unlink(missing_ok=True)
    if run.model is run.base:
        config = {**model_config(run), "dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        (run.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        describe_trained(run, run.directory, state="running")
        write_base(run.directory, run.extension.source, model_config(run))
    run.tokenizer.save_pretrained(run.directory)
    _check_saved(run)


def model_config(run: Run) -> dict[str, Any]:
    """Return config.json of what was trained: the RoPE in both spellings, and whether its ends are tied, by fact."""
    written = {**run.extension.config, "use_cache": True}
    return written if run.base.config.get_text_config().tie_word_embeddings else untied(written)


def describe_trained(run: Run, directory: Path, state: str) -> None:
    """Write beside an adapter of this run the RoPE and the base that it belongs to."""
    output = Path(run.config.output or run.directory)
    describe_adapter(directory, output, "finetune", run.config, model_config(run), run.extension.record, state)


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors in `dtype`; those that share memory (tied embeddings) go on sharing it."""
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for x in state.values():
        made.setdefault((x.data_ptr(), x.shape), x.to(dtype) if x.is_floating_point() else x)
    return {name: made[x.data_ptr(), x.shape] for name, x in state.items()}


def _saved_dtype(run: Run) -> torch.dtype:
    """Return the dtype of a fully trained checkpoint: as asked, else the base's own."""
    name = run.config.save_dtype
    if name == "auto":
        name = str(run.extension.config.get("dtype") or run.extension.config.get("torch_dtype") or "float32")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_saved(run: Run) -> None:
    if run.model is run.base:
        read_shards(run.directory)
        return
    from safetensors import safe_open

    with safe_open(run.directory / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "lora_B" in name]  # noqa: SIM118
        if not names or not any(bool(file.get_tensor(name).any()) for name in names):
            raise TrainingError(
                f"The adapter in {run.directory} is empty: nothing was learned or it was not gathered from all "
                "processes. The last checkpoint is kept; do not use this adapter."
            )


def run_record(run: Run, seconds: float) -> dict[str, Any]:
    """Return the "finetune" part of run.json: what was trained, on what, how."""
    config = run.config
    attention = attention_of(config)
    return {
        "tuning": dataclasses.asdict(run.trainable),
        "attention": {
            "training": attention,
            "definition": ATTENTION_VARIANTS[attention].summary,
            "group_size": run.group_size if attention != "full" else None,
            "evaluation": "full",
        },
        "row_length": run.row_length,
        "target_length": run.extension.target_length,
        "trained_length": run.extension.trained_length,
        "positions": config.positions,
        "data": run.rows.report,
        "rows_per_step": run.global_batch,
        "num_tokens": num_tokens(config, run.extension),
        "num_processes": num_processes(),
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(run.device),
    }
