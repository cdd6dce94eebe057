"""A small model trained for RULER's wording: the 13-task curve before and after, in CPU minutes.

    python benchmarks/ruler_small.py MODEL --books BOOKS --out docs/results/ruler/books-27m --work out/ruler

Prompts of eleven tasks at 512 to 4,096 tokens (questions on paragraphs are left out: there is one set of them, and it
is the test's), other seeds and other books than the test's; YaRN to 4,096, LoRA on answers alone; then `eval ruler`
with its own seed of the model extended and trained, and extended alone. A stage that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from longext.checkpoint.load import load_tokenizer
from longext.checkpoint.source import resolve_model
from longext.evals.ruler.samples import TooShort, ruler_samples
from longext.evals.ruler.sources import read_sources
from longext.evals.ruler.tasks import RULER_TASKS

TRAINED_ON = tuple(name for name in RULER_TASKS if RULER_TASKS[name].kind != "qa")
LENGTHS = (512, 1024, 2048, 4096)
SEED = 1_000_003  # of the training prompts; the test's is 0


def longext(*words: Any) -> None:
    """Run a command of longext."""
    subprocess.run([sys.executable, "-m", "longext", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def write_prompts(model: str, books: Path, number: int, file: Path) -> None:
    """Write `number` prompts of every task and length that fits, with their answers."""
    tokenizer = load_tokenizer(resolve_model(model))
    sources = read_sources("own", str(books), None, None)

    def count(text: str, opening: str) -> int:
        return len(tokenizer.encode(text + opening, add_special_tokens=False))

    with file.open("w", encoding="utf-8") as out:
        for name in TRAINED_ON:
            for length in LENGTHS:
                try:
                    samples = ruler_samples(
                        name, sources, length=length, number=number, seed=SEED + length, count=count, overhead=2
                    )
                except TooShort:
                    continue
                for each in samples:
                    row = {"prompt": each.text + each.opening, "completion": " " + ", ".join(each.answers)}
                    out.write(json.dumps(row) + "\n")


def main() -> None:
    """Write prompts, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", type=Path, required=True, help="folder of text files to hide needles in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/ruler"))
    parser.add_argument("--prompts", type=int, default=12, help="of each task and length, to train on")
    parser.add_argument("--steps", type=int, default=40, help="of 2 rows of 4,096 tokens")
    parser.add_argument("--num-trials", type=int, default=3, help="samples of each task and length in the test")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    prompts, adapter, trained = given.work / "prompts.jsonl", given.work / "lora", given.work / "trained"
    extended = given.work / "extended"
    if not prompts.exists():
        write_prompts(given.model, given.books, given.prompts, prompts)
    if not trained.exists():
        resume = ["--resume"] if adapter.with_name("lora.running").is_dir() else []
        longext(
            "finetune", given.model, "--method", "yarn", "--target-length", 4096, "--task", "sft", "--data", prompts,
            "--separate-documents", "--attention", "full", "--tuning", "lora", "--lora-r", 16, "--lora-alpha", 32,
            "--batch-size", 1, "--accumulation", 2, "--num-steps", given.steps, "--learning-rate", 1e-3,
            "--schedule", "linear", "--set", "warmup_steps=4", "--set", "checkpointing=false", "--save-every", 10,
            "--threads", 1, "-o", adapter, *resume,
        )  # fmt: skip
        longext("merge", adapter, "-o", trained)
    if not extended.exists():
        longext("extend", given.model, "--method", "yarn", "--target-length", 4096, "-o", extended)
    for name, model in (("trained", trained), ("yarn", extended)):
        if (given.out / name / "result.json").exists():
            continue
        longext(
            "eval", "ruler", model, "--lengths", ",".join(map(str, LENGTHS)), "--num-trials", given.num_trials,
            "--answers", "both", "--threads", 1, "-o", given.work / "runs" / name,
        )  # fmt: skip
        (given.out / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given.work / "runs" / name / "result.json", given.out / name / "result.json")


if __name__ == "__main__":
    main()
