"""How much of a text comes back from its memory: auto-encoding alone, by training tokens and by ratio, then lm on top.

    python benchmarks/autoencoding.py books-5m --books BOOKS --eval-books OTHER_BOOKS -o docs/results/ae/books-5m

An anchor learns `ae` alone on documents of one segment, at 2x to 16x; each checkpoint reconstructs segments of unseen
books: BLEU-4, ROUGE-L, exact prefix. The last one then learns `lm`, and is asked again. A stage that is finished is not
run again; a training that was stopped goes on from its last checkpoint. Writes autoencoding.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from records import command, run_longext

from longext.manifest import versions

METRICS = ("bleu", "rouge_l", "exact_prefix", "accuracy", "bits_saved")


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", required=True, help="folder of texts to train on")
    parser.add_argument("--eval-books", required=True, help="folder of other texts")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/autoencoding"), help="where compressors go")
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--ratio", default="2,4,8,16")
    parser.add_argument("--batch-size", type=int, default=64, help="documents of one segment")
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--save-every", type=int, default=120)
    parser.add_argument("--lm-steps", type=int, default=12, help="of 8 documents of 12 segments")
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


def train(given: argparse.Namespace, name: str, *words: Any) -> Path:
    """Return the compressor of a stage; it is trained unless it is there."""
    output = given.work / name
    if not (output / "run.json").is_file():
        resume = ["--resume"] if output.with_name(f"{name}.running").is_dir() else []
        run_longext(
            "compress-train", given.model, "--data", given.books, "--segment", given.segment, "--ratio", given.ratio,
            "--arch", "anchor", "--lora-r", 64, "--lora-alpha", 128, "--schedule", "cosine",
            "--save-every", given.save_every, "--keep-checkpoints", 100, "--set", "checkpointing=false",
            "--set", "weight_decay=0", "--set", "warmup_steps=10", *words, *resume, "-o", output,
        )  # fmt: skip
    return output


def reconstruct(given: argparse.Namespace, name: str, compressor: Path) -> list[dict[str, Any]]:
    """Return what comes back by ratio: each metric with its interval."""
    output = given.work / "runs" / name
    if not (output / "result.json").is_file():
        run_longext(
            "eval", "reconstruction", compressor, "--base", given.model, "--data", given.eval_books,
            "--num-samples", given.num_samples, "-o", output, "--force",
        )  # fmt: skip
    record = json.loads((output / "result.json").read_text(encoding="utf-8"))
    kept = ("ratio", "slots", "num_segments", "num_tokens", "examples")
    return [
        {key: row[key] for key in kept} | {name: row["metrics"][name] for name in METRICS} for row in record["results"]
    ]


def main() -> None:
    """Train, reconstruct, write."""
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    given.output.mkdir(parents=True, exist_ok=True)
    one = [
        "--objectives", "ae", "--document-length", given.segment, "--batch-size", given.batch_size,
        "--num-steps", given.steps, "--learning-rate", given.learning_rate,
    ]  # fmt: skip
    trained = train(given, "ae", *one)
    stages = []
    for checkpoint in sorted((trained / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2])):
        step = int(checkpoint.name.rpartition("-")[2])
        tokens = step * given.batch_size * given.segment
        stages.append({"objective": "ae", "tokens": tokens, "ratios": reconstruct(given, f"ae-{step}", checkpoint)})
    more = [
        "--init", trained, "--objectives", "lm", "--document-length", 12 * given.segment, "--batch-size", 8,
        "--num-steps", given.lm_steps, "--learning-rate", 5e-4,
    ]  # fmt: skip
    after = train(given, "lm", *more)
    tokens += given.lm_steps * 8 * 12 * given.segment
    stages.append({"objective": "ae, then lm", "tokens": tokens, "ratios": reconstruct(given, "lm", after)})
    record = {"command": command(), "versions": versions(), "settings": vars(given), "stages": stages}
    text = json.dumps(record, indent=1, default=str)
    (given.output / "autoencoding.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
