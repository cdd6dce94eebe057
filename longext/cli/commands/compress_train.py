"""Train a compressor: every segment of a long text becomes a few memory tokens that the frozen model reads.

uio is UIO-LLMs, trained with the exact gradient (one segment's graph alive at a time), anchor the same with a better
start; icae, gist, autocompressor, rmt and beacon are its family, prefix a control that is blind to the text. Rarer
settings: -c RECIPE or --set key=value.

Example: longext compress-train books-5m --arch anchor --segment 128 --ratio 8 --data BOOKS -o out/books-5m-memory
"""

from __future__ import annotations

from longext.cli.app import COMMANDS
from longext.cli.build import Command
from longext.compressor.config import CompressConfig
from longext.training.config import DRY_RUN


def run(config: CompressConfig, *, as_json: bool, dry_run: bool) -> None:
    """Check, launch processes if several are asked for, train, write."""
    from longext.cli.training import run_training
    from longext.compressor.train import plan_compressor
    from longext.evals.midway import make_memory_measure
    from longext.report.commands.runs import Trainer
    from longext.report.commands.training import COMPRESS

    trainer = Trainer(plan_compressor, make_memory_measure, COMPRESS)
    run_training(config, trainer, dry_run=dry_run, as_json=as_json)


COMMANDS.register(
    "compress-train",
    Command(config=CompressConfig, run=run, switches=DRY_RUN, needs=("data", "output"), extras=("train",)),
)
