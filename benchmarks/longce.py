"""LongCE against a plain loss at equal steps: the same rows, seed and adapters, then passkeys and perplexity at length.

    python benchmarks/longce.py MODEL --data TRAIN_BOOKS --eval-data OTHER_BOOKS -o docs/results/longce
    python benchmarks/longce.py books-5m --data TRAIN_BOOKS --eval-data OTHER_BOOKS -o out/try --steps 1 \\
        --length 1024 --factor 2 --books 1 --trials 1

YaRN, S2-Attn and LoRA; a run for each loss, resumable (a training that was stopped goes on from its last checkpoint).
Beside the two stands the model under YaRN without training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from records import command

import longext
from longext.manifest import versions
from longext.report.results import dump_json
from longext.report.tables import Table, number

LOSSES = ("untrained", "plain", "longce")


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="texts to train on")
    parser.add_argument("--eval-data", required=True, help="a folder of other books")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--factor", type=float, default=8.0)
    parser.add_argument("--short-context", type=int, help="tokens (default: a quarter row)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--books", type=int, default=10)
    parser.add_argument("--trials", type=int, default=4, help="passkeys at each of five depths")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(given: argparse.Namespace, loss: str) -> tuple[Path, dict[str, Any]]:
    """Return the adapter of a loss and what its run says of itself; trained now if it is not there."""
    directory = given.output / "runs" / loss
    if not (directory / "result.json").is_file():
        own = {"short_context": given.short_context} if loss == "longce" else {}
        longext.finetune(
            given.model, data=given.data, output=directory, method="yarn", factor=given.factor, loss=loss,
            tuning="lora", num_steps=given.steps, accumulation=given.rows, learning_rate=given.learning_rate,
            schedule="linear", warmup_steps=2, checkpointing=False, save_every=10, seed=given.seed, device="cpu",
            threads=torch.get_num_threads(), resume=directory.with_name(f"{loss}.running").is_dir(), **own,
        )  # fmt: skip
    return directory, json.loads((directory / "result.json").read_text(encoding="utf-8"))["finetune"]


def measure(given: argparse.Namespace, loss: str) -> dict[str, Any]:
    """Return passkeys and perplexity of one row of the table."""
    facts, rope = {}, {"method": "yarn", "factor": given.factor}
    directory: str | Path = given.model
    if loss != "untrained":
        directory, record = train(given, loss)
        facts = {key: record[key] for key in ("num_tokens", "seconds", "loss", "data") if key in record}
        rope = {}
    started = time.perf_counter()
    model = longext.load(directory, device="cpu", threads=torch.get_num_threads(), **rope)
    passkey = longext.evaluate(model, "passkey", lengths=[given.length], num_trials=given.trials).record
    ppl = longext.evaluate(
        model, "ppl", data=given.eval_data, max_documents=given.books, max_tokens=given.length + given.length // 4,
        lengths=[given.length], stride=given.length // 4,
    ).record  # fmt: skip
    return {
        "loss": loss,
        "command": command(),
        "versions": versions(),
        "settings": {key: value for key, value in vars(given).items() if key not in ("model", "output")},
        "training": facts,
        "passkey": {key: passkey[key] for key in ("protocol", "results", "by_length")},
        "perplexity": {key: ppl[key] for key in ("protocol", "data", "results")},
        "seconds": time.perf_counter() - started,
    }


def table_of(results: list[dict[str, Any]], length: int) -> Table:
    """Return the three rows."""
    rows = []
    for result in results:
        keys, ppl = result["passkey"]["by_length"][0], result["perplexity"]["results"][0]
        training = result["training"]
        rows.append(
            [result["loss"], f"{keys['accuracy']:.0%} ({keys['low']:.0%}-{keys['high']:.0%})", number(ppl["ppl"]),
             f"{training['num_tokens']:,}" if training else "-", f"{training['seconds']:.0f}" if training else "-"]
        )  # fmt: skip
    heads = ["loss", f"passkeys at {length:,}", f"perplexity at {length:,}", "tokens trained on", "seconds"]
    return Table("LongCE and a plain loss at equal steps", heads, rows, caption="in brackets Wilson's 95% interval")


def main() -> None:
    """Train and measure what is not there yet, then write table.md."""
    given = arguments()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    results = []
    for loss in LOSSES:
        path = given.output / f"{loss}.json"
        if not path.is_file():
            path.write_text(dump_json(measure(given, loss)) + "\n", encoding="utf-8")
        results.append(json.loads(path.read_text(encoding="utf-8")))
        print(f"{loss}: passkeys {results[-1]['passkey']['by_length'][0]['accuracy']:.0%}", flush=True)
    text = table_of(results, given.length).to_markdown()
    print(text)
    (given.output / "table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
