"""The architectures beside each other: the same documents in the same order, the same number of steps and slots.

Every compressor is trained with the exact gradient on the next tokens alone, then measured on held-out books: the next
segment with its memory, with none and with another book's. Finished runs are not run again.

    python benchmarks/compressor_family.py MODEL --train BOOKS --validation OTHER_BOOKS -o family.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from compressor_policies import validation_books
from records import add_output, write_record

FAMILY = ("uio", "anchor", "icae", "icae:kv", "gist", "autocompressor", "rmt", "beacon", "prefix")
CONTEXTS = (1, 4, 11)  # segments of memory before the scored one


def main() -> None:
    """Train what is missing, measure, print a table."""
    arguments = parse()
    rows = []
    for name in arguments.archs.split(","):
        train(arguments, name)
        rows.append(measure(arguments, name))
        about = {key: value for key, value in vars(arguments).items() if key not in ("output", "train", "work")}
        write_record(arguments.output, arguments=about, rows=rows)
    print_table(arguments, rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--work", default="out/family", help="where what is trained goes")
    add_output(parser)
    parser.add_argument("--archs", default=",".join(FAMILY), help="arch or arch:memory kind, comma-separated")
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--ratio", type=int, default=8)
    parser.add_argument("--documents", type=int, default=8, help="documents of a step")
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", type=int, default=16, help="scored segments of each validation book")
    return parser.parse_args()


def directory_of(arguments: argparse.Namespace, name: str) -> Path:
    """Return where a run lies."""
    return Path(arguments.work) / f"family-{name.replace(':', '-')}-{arguments.seed}"


def train(arguments: argparse.Namespace, name: str) -> None:
    """Run one training unless it is there."""
    output = directory_of(arguments, name)
    if (output / "compressor.json").is_file():
        return
    arch, _, kind = name.partition(":")
    command = [
        sys.executable, "-m", "longext", "compress-train", arguments.model, "--arch", arch, "--data", arguments.train,
        "--segment", arguments.segment, "--ratio", arguments.ratio, "--lora-r", 64, "--lora-alpha", 128,
        "--document-length", 12 * arguments.segment, "--batch-size", arguments.documents,
        "--num-steps", arguments.num_steps, "--learning-rate", arguments.learning_rate, "--seed", arguments.seed,
        "--save-every", 20, "--set", "checkpointing=false", "--set", "warmup_steps=10", "--set", "weight_decay=0",
        "-o", output,
    ]  # fmt: skip
    command += ["--memory-kind", kind] if kind else []
    command += ["--resume"] if output.with_name(f"{output.name}.running").is_dir() else []
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def measure(arguments: argparse.Namespace, name: str) -> dict:
    """Return sizes, seconds of a step, and for each context NLL and paired differences by book."""
    from longext.compressor.checkpoint import load_compressor
    from longext.evals.memory.controls import MEMORY, NO_MEMORY, WRONG
    from longext.evals.memory.next_segment import evaluate_memory

    output = directory_of(arguments, name)
    cached = output / "family.json"
    if cached.is_file():
        return json.loads(cached.read_text())
    loaded = load_compressor(output, device="cpu")
    books = validation_books(arguments, loaded.tokenizer)
    lengths = [arguments.segment * count for count in CONTEXTS]
    methods = (MEMORY, NO_MEMORY, WRONG)
    results = evaluate_memory(loaded.compressor, books, lengths, arguments.places, 0, methods=methods, num_bootstrap=0)
    nll = {f"{r.method}@{r.length}": [d["nll"] for d in r.per_document] for r in results}
    row = {
        "arch": name,
        "num_parameters": sum(p.numel() for p in loaded.compressor.parameters()),
        "seconds_per_step": step_seconds(arguments, loaded.compressor),
        "nll": nll,
    }
    cached.write_text(json.dumps(row))
    return row


def step_seconds(arguments: argparse.Namespace, compressor) -> float:
    """Return the CPU seconds of one step's gradient, the best of three."""
    from longext.compressor.gradients import Sweep, backprop
    from longext.compressor.policies import parse_policy
    from longext.compressor.segments import split_segments

    ids, best = torch.randint(3, 8000, (arguments.documents, 12 * arguments.segment)), float("inf")
    for repeat in range(3):
        document = Sweep(split_segments(ids, ids, compressor.spec, [arguments.ratio] * 12), compressor, 1e-4)
        started = time.process_time()
        backprop(document, parse_policy("exact"), np.random.default_rng(repeat))
        best = min(best, time.process_time() - started)
    return best


def print_table(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """Print perplexities by context and the differences at the longest, with intervals over books."""
    names = [f"{count * arguments.segment:,}" for count in CONTEXTS]
    last = CONTEXTS[-1] * arguments.segment
    print(f"\n**Perplexity of the next {arguments.segment} tokens by tokens of context**\n")
    print("| arch | trained | s/step | " + " | ".join(names) + f" | none | minus none at {last} | minus another book |")
    print("|:--|--:|--:|" + "--:|" * (len(CONTEXTS) + 3))
    for row in rows:
        nll = {key: np.array(values) for key, values in row["nll"].items()}
        memory = nll[f"memory@{last}"]
        cells = [f"{row['num_parameters']:,}", f"{row['seconds_per_step']:.2f}"]
        cells += [f"{np.exp(nll[f'memory@{count * arguments.segment}'].mean()):.2f}" for count in CONTEXTS]
        cells.append(f"{np.exp(nll[f'no memory@{last}'].mean()):.2f}")
        cells += [spell(memory - nll[f"{control}@{last}"]) for control in ("no memory", "wrong document")]
        print(f"| {row['arch']} | " + " | ".join(cells) + " |")


def spell(by_book: np.ndarray) -> str:
    """Return the mean with a 95 % bootstrap interval over books."""
    rng = np.random.default_rng(0)
    means = by_book[rng.integers(0, len(by_book), (10_000, len(by_book)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{by_book.mean():+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
