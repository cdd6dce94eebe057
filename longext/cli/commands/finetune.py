"""Extend a checkpoint and train it at its new length (LongLoRA).

Trains with shifted sparse attention (S2-Attn), LoRA, embeddings and norms; every evaluation uses full attention. Writes
an adapter that `longext merge` turns into a standard checkpoint. Rarer settings: -c RECIPE or --set key=value.

Example: longext finetune books-5m --data BOOKS --method linear --target-length 4096 -o out/books-5m-4k-lora
"""

from __future__ import annotations

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.training.config import DRY_RUN, FinetuneConfig


def run(config: FinetuneConfig, *, as_json: bool, dry_run: bool) -> None:
    """Check, launch processes if several are asked for, train, write."""
    from longext.cli.training import run_training
    from longext.evals.midway import make_perplexity_measure
    from longext.report.commands.runs import Trainer
    from longext.report.commands.training import FINETUNE
    from longext.training.longlora import plan_finetune

    trainer = Trainer(plan_finetune, make_perplexity_measure, FINETUNE)
    run_training(config, trainer, dry_run=dry_run, as_json=as_json)


COMMANDS.register(
    "finetune",
    Command(config=FinetuneConfig, run=run, switches=DRY_RUN, needs=("data", "output"), extras=("train",)),
)
