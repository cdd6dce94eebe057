"""Does LongPPL tell which extension finds passkeys, and does perplexity? Correlations over variants of one model.

    python benchmarks/longppl.py MODEL --data BOOKS -o docs/results/longppl     # a file for each variant, resumable
    python benchmarks/longppl.py books-5m --data BOOKS -o out/try --books 1 --length 1024 --trials 1 \\
        --variants none,yarn=2,linear=4

Every variant (method=factor, applied in memory) is measured on the same texts and the same passkeys of --length tokens.
Key tokens are found once, by --evaluator. Correlations are Pearson's, of accuracy with the logarithm of each perplexity
and with the perplexity itself, with Fisher's 95 % interval; the logarithm keeps one variant that explodes from being
all that is seen.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import command

import longext
from longext.data.long_short import MIN_GAIN
from longext.evals.base import Work
from longext.evals.suites.longppl import KEY_FILE, LongPPL, keys_text
from longext.manifest import versions
from longext.report.results import dump_json
from longext.report.tables import Table, number

VARIANTS = (
    "none linear=4 linear=8 ntk=4 ntk=8 ntk-by-parts=4 ntk-by-parts=8 yarn=4 yarn=8 dynamic:alpha=8=4 resonance=4 "
    "resonance=8 selfextend:logn=true=4 leaky-rerope:logn=true=8 window=4"
).split()


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="a folder of books")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--evaluator", help="finds key tokens: a checkpoint of your own (default: MODEL)")
    parser.add_argument("--evaluator-method", help="default: leaky-rerope:logn=true=8 if MODEL is its own evaluator")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="method=factor, comma-separated")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--short-context", type=int, default=128)
    parser.add_argument("--min-gain", type=float, default=MIN_GAIN, help="nats; fewer give more key tokens")
    parser.add_argument("--books", type=int, default=8)
    parser.add_argument("--windows", type=int, default=2, help="texts of each book")
    parser.add_argument("--trials", type=int, default=2, help="passkeys at each of five depths")
    return parser.parse_args()


def method_of(variant: str) -> dict[str, Any]:
    """Return method and factor of "yarn=8" or "dynamic:alpha=8=4"; nothing for the model as it is."""
    name, _, factor = variant.rpartition("=")
    return {"method": name, "factor": float(factor)} if name else {}


def task_of(given: argparse.Namespace, **who: Any) -> LongPPL:
    """Return the evaluation, with who finds key tokens."""
    return LongPPL(
        model=given.model, data=given.data, max_documents=given.books, lengths=(given.length,),
        num_windows=given.windows, short_context=given.short_context, min_gain=given.min_gain, **who,
    )  # fmt: skip


def find_keys(given: argparse.Namespace) -> Path:
    """Return the file of key tokens; made by the evaluator if it is not there."""
    path: Path = given.output / KEY_FILE
    if not path.is_file():
        spelled = given.evaluator_method or ("" if given.evaluator else "leaky-rerope:logn=true=8")
        own = {f"evaluator_{name}": value for name, value in method_of(spelled).items()}
        task = task_of(given, evaluator=given.evaluator or given.model, **own)
        task.check()
        documents = task.load_data()
        path.write_text(keys_text(*task.find_keys(documents, Work()), documents, task), encoding="utf-8")
    return path


def measure(given: argparse.Namespace, variant: str, keys: Path) -> dict[str, Any]:
    """Return LongPPL, perplexity and passkey accuracy of one variant."""
    started = time.perf_counter()
    model = longext.load(given.model, device="cpu", threads=torch.get_num_threads(), **method_of(variant))
    task = task_of(given, key_tokens=str(keys))
    record = task.measure(model, task.load_data(), Work()).record
    passkey = longext.evaluate(model, "passkey", lengths=[given.length], num_trials=given.trials).record
    return {
        "variant": variant,
        "command": command(),
        "versions": versions(),
        "longppl": record,
        "passkey": {key: passkey[key] for key in ("protocol", "results", "by_length")},
        "seconds": time.perf_counter() - started,
    }


def correlation(one: list[float], other: list[float]) -> dict[str, float | None]:
    """Return Pearson's r with Fisher's 95 % interval; None where one of the two is constant or there are too few."""
    if len(one) < 4 or np.std(one) == 0 or np.std(other) == 0:
        return {"r": None, "low": None, "high": None}
    r = float(np.corrcoef(one, other)[0, 1])
    centre, half = np.arctanh(np.clip(r, -0.999999, 0.999999)), 1.96 / np.sqrt(len(one) - 3)
    return {"r": r, "low": float(np.tanh(centre - half)), "high": float(np.tanh(centre + half))}


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row for each variant, and the correlations."""
    rows = []
    for result in results:
        row, passkey = result["longppl"]["results"][0], result["passkey"]["by_length"][0]
        known = {key: row[key] for key in ("longppl", "ppl", "num_key_tokens", "num_tokens")}
        rows.append({"variant": result["variant"], **known, **{k: passkey[k] for k in ("accuracy", "low", "high")}})
    accuracy = [row["accuracy"] for row in rows]
    found = {}
    for name in ("longppl", "ppl"):
        values = [row[name] for row in rows]
        found[f"log {name}"] = correlation(np.log(values).tolist(), accuracy)
        found[name] = correlation(values, accuracy)
    return {"rows": rows, "correlations": found, "evaluator": results[0]["longppl"]["protocol"]["evaluator"]}


def tables(summary: dict[str, Any], length: int) -> list[Table]:
    """Return variants, the best at passkeys first, and correlations."""
    rows = sorted(summary["rows"], key=lambda row: (-row["accuracy"], row["longppl"]))
    shown = [
        [row["variant"], f"{row['accuracy']:.0%} ({row['low']:.0%}-{row['high']:.0%})", number(row["longppl"]),
         number(row["ppl"])]
        for row in rows
    ]  # fmt: skip
    pairs = [
        [name, "-" if own["r"] is None else f"{own['r']:+.2f} ({own['low']:+.2f} to {own['high']:+.2f})"]
        for name, own in summary["correlations"].items()
    ]
    keys = (
        f"{rows[0]['num_key_tokens']:,} key tokens of {rows[0]['num_tokens']:,}; evaluator {summary['evaluator']['id']}"
    )
    return [
        Table(f"Variants at {length:,} tokens", ["variant", "passkeys", "LongPPL", "perplexity"], shown, caption=keys),
        Table("Correlation with passkey accuracy", ["of", "r"], pairs, caption="in brackets Fisher's 95% interval"),
    ]


def main() -> None:
    """Measure what is not there yet, then write summary.json and table.md."""
    given = arguments()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    keys = find_keys(given)
    results = []
    for variant in given.variants.split(","):
        path = given.output / f"{re.sub(r'[^a-z0-9.]+', '-', variant)}.json"
        if not path.is_file():
            path.write_text(dump_json(measure(given, variant, keys)) + "\n", encoding="utf-8")
        results.append(json.loads(path.read_text(encoding="utf-8")))
        row = summarise(results)["rows"][-1]
        print(f"{variant}: LongPPL {row['longppl']:.2f}, perplexity {row['ppl']:.2f}, passkeys {row['accuracy']:.0%}, "
              f"{results[-1]['seconds']:.0f} s", flush=True)  # fmt: skip
    summary = summarise(results)
    text = "\n".join(table.to_markdown() for table in tables(summary, given.length))
    print(text)
    (given.output / "summary.json").write_text(dump_json(summary) + "\n", encoding="utf-8")
    (given.output / "table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
