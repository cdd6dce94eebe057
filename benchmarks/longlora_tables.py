"""LongLoRA's tables 1 and 2 on a small model: how attention in training, and what is trained, change perplexity.

Every run extends by linear interpolation and trains the same steps on the same rows with the same seed; perplexity is
measured with full attention before and after. Runs that are finished are not run again, so the benchmark can be
interrupted.

    python benchmarks/longlora_tables.py MODEL --train BOOKS --validation OTHER_BOOKS -o results/longlora
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

# name -> (attention in training, what is trained); table 1 of arXiv 2309.12307, then table 2
TABLE_1 = {
    "full attention": ("full", "full"),
    "S2-Attn (no leak)": ("s2", "full"),
    "S2-Attn (wrapped, the paper's roll)": ("s2-wrapped", "full"),
    "short attention, no shift": ("short", "full"),
}
TABLE_2 = {
    "full fine-tuning": ("s2", "full"),
    "LoRA": ("s2", "lora"),
    "LoRA + norm": ("s2", "lora+norm"),
    "LoRA + embed": ("s2", "lora+embed"),
    "LoRA + embed + norm": ("s2", "lora+embed+norm"),
}


def main() -> None:
    """Run what is not there yet and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("-o", "--output", default="results/longlora")
    parser.add_argument("--target-length", type=int, default=4096)
    parser.add_argument("--num-steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=8)
    arguments = parser.parse_args()
    pairs = dict.fromkeys([*TABLE_1.values(), *TABLE_2.values()])
    results = {pair: run(arguments, *pair) for pair in pairs}
    for title, table in (
        ("Table 1: attention in training (full fine-tuning)", TABLE_1),
        ("Table 2: what is trained (S2-Attn)", TABLE_2),
    ):
        print_table(title, {name: results[pair] for name, pair in table.items()})


def run(arguments: argparse.Namespace, attention: str, tuning: str) -> dict:
    """Return the result record of one run, from its file where it is finished."""
    output = Path(arguments.output) / f"{attention}-{tuning}".replace("+", "_")
    if not (output / "result.json").is_file():
        command = [
            sys.executable, "-m", "longext", "finetune", arguments.model, "--data", arguments.train,
            "--method", "linear", "--target-length", str(arguments.target_length),
            "--attention", attention, "--tuning", tuning, "--num-steps", str(arguments.num_steps),
            "--accumulation", str(arguments.rows), "--learning-rate", str(arguments.learning_rate),
            "--seed", str(arguments.seed), "--eval-data", arguments.validation, "-o", str(output), "--save-every", "50",
            "--set", "checkpointing=false", "--set", f"eval_documents={arguments.documents}",
            "--set", "keep_checkpoints=1",
        ]  # fmt: skip
        if output.with_name(f"{output.name}.running").is_dir():
            command.append("--resume")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    made = json.loads((output / "run.json").read_text())["config"]
    asked = {"num_steps": arguments.num_steps, "learning_rate": arguments.learning_rate, "seed": arguments.seed}
    if any(made[key] != value for key, value in asked.items()):
        sys.exit(f"{output} was made with other settings. Choose another -o.")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(line["tokens_per_second"] for line in lines if "loss" in line)
    return {**json.loads((output / "result.json").read_text()), "tokens_per_second": speed}


def print_table(title: str, rows: dict[str, dict]) -> None:
    """Print perplexity by length before and after training, in Markdown."""
    first = next(iter(rows.values()))
    lengths = list(first["perplexity"][0]["perplexity"])
    print(f"\n**{title}**\n\n| | {' | '.join(f'{int(n):,}' for n in lengths)} | trained | tokens/s |")
    print("|:--|" + "--:|" * (len(lengths) + 2))
    before = first["perplexity"][0]["perplexity"]
    print(f"| before training | {' | '.join(f'{before[n]:.2f}' for n in lengths)} | | |")
    for name, record in rows.items():
        after = record["perplexity"][-1]["perplexity"]
        trained = record["finetune"]["tuning"]["num_trainable"]
        cells = [*(f"{after[n]:.2f}" for n in lengths), f"{trained:,}", f"{record['tokens_per_second']:,.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
