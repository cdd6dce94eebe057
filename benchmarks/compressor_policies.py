"""Does the exact gradient pay? Compressors trained under each policy, at equal steps and at equal time.

Every run has the same documents in the same order and the same initial weights for a seed; only the gradient differs.
Held-out perplexity of the next segment is measured at each checkpoint, on the same places for all. Time of a step is
measured apart, interleaved, so that a busy machine does not favour one. Finished runs are not run again.

    python benchmarks/compressor_policies.py MODEL --train BOOKS --validation OTHER_BOOKS -o policies.json
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
from records import add_output, write_record

POLICIES = ("exact", "window:2", "reservoir:2", "reservoir-raw:2")
CONTEXTS = (1, 4, 11)  # segments of memory before the scored one


def main() -> None:
    """Train what is missing, measure, print two tables."""
    arguments = parse()
    for seed in range(arguments.seeds):
        for policy in POLICIES:
            train(arguments, policy, seed)
    seconds = time_steps(arguments)
    nll = {(policy, seed): measure(arguments, policy, seed) for policy in POLICIES for seed in range(arguments.seeds)}
    record = {
        "seconds_per_step": seconds,
        "nll": [{"policy": p, "seed": s, "by_step": values} for (p, s), values in nll.items()],
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("output", "train", "work")},
    }
    write_record(arguments.output, **record)
    print_tables(arguments, nll, seconds)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--work", default="out/policies", help="where what is trained goes")
    add_output(parser)
    parser.add_argument("--arch", default="anchor")
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--ratio", type=int, default=8)
    parser.add_argument("--documents", type=int, default=8, help="documents of a step")
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--places", type=int, default=24, help="scored segments of each validation book")
    return parser.parse_args()


def directory_of(arguments: argparse.Namespace, policy: str, seed: int) -> Path:
    """Return where a run lies."""
    return Path(arguments.work) / f"pol-{policy.replace(':', '_')}-{seed}"


def train(arguments: argparse.Namespace, policy: str, seed: int) -> None:
    """Run one training unless it is there."""
    output = directory_of(arguments, policy, seed)
    if (output / "compressor.json").is_file():
        return
    command = [
        sys.executable, "-m", "longext", "compress-train", arguments.model, "--arch", arguments.arch,
        "--data", arguments.train, "--segment", arguments.segment, "--ratio", arguments.ratio, "--lora-r", 64,
        "--lora-alpha", 128, "--document-length", 12 * arguments.segment, "--gradient", policy,
        "--batch-size", arguments.documents, "--num-steps", arguments.num_steps,
        "--learning-rate", arguments.learning_rate, "--seed", seed, "--save-every", arguments.num_steps // 4,
        "--set", "checkpointing=false", "--set", "schedule=constant", "--set", "warmup_steps=10",
        "--set", "weight_decay=0", "--set", "keep_checkpoints=4", "-o", output,
    ]  # fmt: skip
    if output.with_name(f"{output.name}.running").is_dir():
        command.append("--resume")
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def validation_books(arguments: argparse.Namespace, tokenizer) -> list[list[int]]:
    """Return the token ids of the validation documents."""
    from longext.data.documents import load_documents
    from longext.options import DataConfig

    documents = load_documents(DataConfig(data=arguments.validation, max_documents=8))
    return [tokenizer(d.text, add_special_tokens=False, verbose=False).input_ids for d in documents]


def measure(arguments: argparse.Namespace, policy: str, seed: int) -> dict[str, list[list[float]]]:
    """Return NLL by checkpoint step: for each context length one mean per validation book."""
    from safetensors.torch import load_file

    from longext.compressor.checkpoint import load_compressor
    from longext.evals.memory.controls import MEMORY
    from longext.evals.memory.next_segment import evaluate_memory

    output = directory_of(arguments, policy, seed)
    cached = output / "policies-nll.json"
    if cached.is_file():
        return json.loads(cached.read_text())
    loaded = load_compressor(output, device="cpu")
    books = validation_books(arguments, loaded.tokenizer)
    lengths = [arguments.segment * count for count in CONTEXTS]
    found = {}
    for checkpoint in sorted((output / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        loaded.compressor.load_state_dict(load_file(checkpoint / "model.safetensors"))
        results = evaluate_memory(
            loaded.compressor, books, lengths, arguments.places, 0, methods=(MEMORY,), num_bootstrap=0
        )
        found[checkpoint.name.split("-")[1]] = [[d["nll"] for d in result.per_document] for result in results]
    cached.write_text(json.dumps(found))
    return found


def time_steps(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the best of interleaved measurements of one step's gradient, in seconds, by policy."""
    from longext.compressor.checkpoint import load_compressor
    from longext.compressor.gradients import Sweep, backprop
    from longext.compressor.policies import parse_policy
    from longext.compressor.segments import split_segments

    compressor = load_compressor(directory_of(arguments, POLICIES[0], 0), device="cpu").compressor
    ids = torch.randint(3, 8000, (arguments.documents, 12 * arguments.segment))
    best = dict.fromkeys(POLICIES, float("inf"))
    for repeat in range(4):
        for policy in POLICIES:
            document = Sweep(split_segments(ids, ids, compressor.spec, [arguments.ratio] * 12), compressor, 1e-4)
            started = time.process_time()
            backprop(document, parse_policy(policy), np.random.default_rng(repeat))
            best[policy] = min(best[policy], time.process_time() - started)
    return best


def print_tables(arguments: argparse.Namespace, nll: dict, seconds: dict[str, float]) -> None:
    """Print perplexity at equal steps and at equal time, and paired differences from exact with their interval."""
    last = str(arguments.num_steps)
    names = [f"{count * arguments.segment:,}" for count in CONTEXTS]
    print(f"\n**Perplexity of the next segment by context, mean of {arguments.seeds} seeds**\n")
    print("| gradient | s/step | " + " | ".join(names) + " | NLL minus exact at equal steps | at equal time |")
    print("|:--|--:|" + "--:|" * (len(CONTEXTS) + 2))
    seeds = range(arguments.seeds)
    exact = {seed: np.array(nll["exact", seed][last])[-1] for seed in seeds}
    for policy in POLICIES:
        mean = np.mean([nll[policy, seed][last] for seed in seeds], axis=(0, 2))
        equal = np.stack([np.array(nll[policy, seed][last])[-1] - exact[seed] for seed in seeds])
        budget = seconds[policy] / seconds["exact"] * arguments.num_steps  # steps of exact in this policy's time
        in_time = np.stack(
            [np.array(nll[policy, seed][last])[-1] - at_step(nll["exact", seed], budget) for seed in seeds]
        )
        cells = [f"{seconds[policy]:.2f}", *(f"{np.exp(value):.2f}" for value in mean), spell(equal), spell(in_time)]
        print(f"| {policy} | " + " | ".join(cells) + " |")


def at_step(by_step: dict[str, list[list[float]]], step: float) -> np.ndarray:
    """Return the NLL by book at the longest context, between checkpoints by straight line; held at the last."""
    steps = sorted(map(int, by_step))
    values = np.array([by_step[str(s)][-1] for s in steps])
    return np.array([np.interp(step, steps, values[:, book]) for book in range(values.shape[1])])


def spell(differences: np.ndarray) -> str:
    """Return the mean of [seeds, books] with a 95 % bootstrap interval over books, seeds averaged."""
    by_book = differences.mean(0)
    if not by_book.any():
        return "0"
    rng = np.random.default_rng(0)
    means = by_book[rng.integers(0, len(by_book), (10_000, len(by_book)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    spread = ", ".join(f"{value:+.4f}" for value in differences.mean(1))
    return f"{by_book.mean():+.4f} ({low:+.4f} to {high:+.4f}; by seed {spread})"


if __name__ == "__main__":
    main()
