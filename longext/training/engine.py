"""The one training engine: transformers' Trainer on accelerate, for one process or many.

What it adds: complete-or-absent checkpoints, a stop at NaN that names the batch, a stop at SIGTERM that saves first,
and data whose order depends on the seed alone; for attention variants plans from document ids and sequence parallelism.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback

from longext.attention.chunks import KeyValueStore
from longext.attention.layout import make_layout
from longext.attention.sequence import SequenceGroup, split_sequence
from longext.attention.shifted import PLAN, AttentionPlan
from longext.errors import TrainingError
from longext.processes.group import gather, is_sharded, num_processes, process_rank, sum_gradients
from longext.signals import handling
from longext.training.checkpoints import drop_after, keep_last, mark_complete, random_state_name
from longext.training.losses import LABEL_WEIGHTS, shift
from longext.training.sweep import sweep_rows


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows in training order, as the processes of a run take them.

    Args:
        rows: row i of the whole run; a pure function of the seed and i.
        batch_size: rows per process and forward.
        copies: ranks that share a row (sequence parallelism): accelerate deals consecutive batches to consecutive
            ranks, so each batch is repeated for them.
    """

    def __init__(self, rows: Any, batch_size: int, copies: int = 1) -> None:
        self.rows, self.batch_size, self.copies = rows, batch_size, copies

    def __len__(self) -> int:
        return len(self.rows) * self.copies

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch, offset = divmod(index, self.batch_size)
        number = batch // self.copies * self.batch_size + offset
        return {**self.rows[number], "row": torch.tensor(number)}


class Engine(Trainer):  # type: ignore[misc]
    """A Trainer whose batches are rows of `Rows`.

    Args:
        rows: the training rows.
        sequence: the ranks that share each row.
        fingerprint: what decides the run's numbers; stored with each checkpoint.
        keep_checkpoints: how many to keep.
        describe: called with the directory of a checkpoint whose weights are written: adds what says what they are.
        model, args, ...: as for Trainer.
    """

    def __init__(
        self,
        *,
        rows: Rows,
        sequence: SequenceGroup | None,
        fingerprint: dict[str, Any],
        keep_checkpoints: int,
        describe: Callable[[Path], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=rows, **kwargs)
        self.describe = describe
        self.rows = rows
        self.sequence = sequence
        self.fingerprint, self.keep_checkpoints = fingerprint, keep_checkpoints
        self.model_accepts_loss_kwargs = True  # losses here are divided by num_items_in_batch
        self._row_numbers: torch.Tensor | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward; a loss that is not finite ends the run and names the rows."""
        self._row_numbers = inputs["row"]
        loss: torch.Tensor = self.forward_backward(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            where = "; ".join(self.rows.rows.describe(number) for number in self._row_numbers.tolist())
            raise TrainingError(
                f"The loss is {float(loss)} at step {self.state.global_step + 1}, in {where}. Lower --learning-rate, "
                "look at that text, or go on from the last checkpoint, if there is one, with --resume."
            )
        return loss

    def forward_backward(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Add the gradient of one batch and return its loss; Trainer's own way unless overridden."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def train_from(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start; what an interrupted run left after it is deleted."""
        if self.args.should_save:
            drop_after(Path(self.args.output_dir), checkpoint)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        # Trainer reads config.json with the base class of all configs, which raises AttributeError for a yarn, llama3
        # or longrope RoPE (transformers 5.23); it wants the version alone, so it is shown the other files
        with tempfile.TemporaryDirectory() as folder:
            for path in Path(resume_from_checkpoint).resolve().iterdir():
                if path.name != "config.json":
                    (Path(folder) / path.name).symlink_to(path)
            super()._load_from_checkpoint(folder, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        directory = Path(self.args.output_dir)
        checkpoint = directory / f"checkpoint-{self.state.global_step}"
        world = num_processes()
        states = gather((checkpoint / random_state_name(process_rank(), world)).read_bytes())
        if self.args.should_save:
            for rank, state in enumerate(states):
                file = checkpoint / random_state_name(rank, world)
                if not file.is_file():  # written on another machine, to a disk that is not shared
                    file.write_bytes(state)
            if self.describe:
                self.describe(checkpoint)
            mark_complete(checkpoint, self.fingerprint, processes=world, sharded=is_sharded())
            keep_last(directory, self.keep_checkpoints)


class AttentionEngine(Engine):
    """The engine of a model that trains under an attention variant: every batch gets its `AttentionPlan`.

    Args:
        group_size: G of S2-Attn, in tokens.
        backend: attention backend.
        separate_documents: documents of a row do not attend to one another.
        chunk: tokens of a chunk of a sweep, None for whole rows in one graph.
        new_store: makes the store of one batch's keys and values, for a sweep.
        weigh: rows int64 [B, N] -> the weight of each token's label [B, N], aligned; None for a plain loss.
    """

    def __init__(
        self,
        *,
        group_size: int,
        backend: str,
        separate_documents: bool,
        chunk: int | None = None,
        new_store: Callable[[], KeyValueStore] = KeyValueStore,
        weigh: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.group_size, self.backend, self.separate_documents = group_size, backend, separate_documents
        self.chunk, self.new_store, self.weigh = chunk, new_store, weigh

    def forward_backward(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Add the gradient of one batch and return its loss: in one graph, or swept in chunks."""
        if self.chunk is None or self.chunk >= inputs["input_ids"].shape[1]:
            return super().forward_backward(model, inputs, num_items_in_batch)
        # DDP's own sum over processes waits for one backward pass of one forward: here there are many
        network = self.accelerator.unwrap_model(model)
        network.train()
        arguments = self._forward_arguments(dict(self._prepare_inputs(inputs)))
        total = sweep_rows(
            network,
            {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)},
            arguments[PLAN],
            self.chunk,
            num_items_in_batch,
            store=self.new_store(),
            autocast=self.accelerator.autocast,
        )
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            sum_gradients(network)
        world: int = self.args.world_size
        return total * world  # Trainer reports the mean over processes

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the summed loss over the step's tokens, divided by their number in all processes."""
        inputs = self._forward_arguments(dict(inputs))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # every rank of a sequence group counted the same labels
        return loss if self.sequence is None else loss * self.sequence.size

    def _forward_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Turn a batch of rows into what the model's forward takes; this rank's share of it if rows are shared."""
        inputs.pop("row")
        documents = inputs.pop("document_ids")
        if "shift_labels" in inputs:  # accelerate's context parallelism has cut and shifted them already
            return {**{name: x for name, x in inputs.items() if name != "labels"}, "use_cache": False}
        rows, length = inputs["input_ids"].shape
        layout = make_layout(rows, length, None, documents, self.separate_documents)
        positions = inputs.pop("position_ids", None)
        if positions is None:
            positions = torch.arange(length, device=documents.device).expand(rows, length)
        tensors = {
            "input_ids": inputs["input_ids"],
            "position_ids": positions,
            "labels": inputs["labels"],  # asks a model without our loss hooks for its own loss
            "shift_labels": shift(inputs["labels"]),
        }
        if self.weigh is not None:
            tensors[LABEL_WEIGHTS] = self.weigh(inputs["input_ids"])
        if self.sequence is not None:
            tensors = {name: split_sequence(x, self.sequence).contiguous() for name, x in tensors.items()}
        return {
            **tensors,
            PLAN: AttentionPlan(layout, self.group_size, self.backend, self.sequence),
            "use_cache": False,
        }


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """SIGTERM (a scheduler's warning), SIGHUP and Ctrl-C: finish the step, save a checkpoint, stop.

    A signal that is ignored (nohup) stays ignored. A second Ctrl-C stops at once.
    All processes agree after each step, since the signal need not reach them in the same one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._handling = handling(self._note)

    def __enter__(self) -> StopOnSignal:
        self._handling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handling.__exit__(*error)

    def _note(self, number: int, _: Any) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask for a checkpoint and the end of the run once any process has a signal."""
        number = self.received or 0
        if dist.is_initialized():
            flag = torch.tensor([number], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag)
        if number:
            self.received = number
            control.should_save = True
            control.should_training_stop = True
        return control
