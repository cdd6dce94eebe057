"""Position remapping beside YaRN, dynamic NTK and a raw window: the same tokens, the same passkeys, paired intervals.

    python benchmarks/bands.py --model MODEL --data BOOKS -o docs/results/bands      # a file per method, resumable
    python benchmarks/bands.py --model MODEL --data BOOKS -o out/try --books 1 --places 1 --num-trials 1 --depths 0,1
    python benchmarks/bands.py --model SMOLLM2 --data BOOKS -o out/smollm2 --lengths 8192,16384 --factor 2 \\
        --scored 2048 --books 2 --places 1 --num-trials 1 --depths 0.25,0.75 --methods none,yarn,leaky-rerope:logn=true

At each place of each book the same tokens are scored with every length as context, so that `none` at the trained length
is the raw window of the same bytes. A method that is finished is not run again; --tables makes the tables and the
picture of what is there. Intervals are of 95 %: paired t over books for changes of perplexity, Wilson's for passkeys.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from records import command

import longext
from longext.data.documents import data_hash, load_documents
from longext.evals.statistics import paired_interval
from longext.evals.suites.ppl import Perplexity
from longext.manifest import versions
from longext.report.commands.advise import advice_figures
from longext.report.results import dump_json
from longext.report.tables import Table, number

LOGN = ("leaky-rerope", "rerope", "selfextend", "lampe", "dpe", "dca", "string")
METHODS = ("none", "yarn", "dynamic:alpha=8", *LOGN, *(f"{name}:logn=true" for name in LOGN), "window")
_ENOUGH = 5  # books for an interval


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a folder of books, each as long as the longest length")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS), help="`none` and `yarn` are what others are held to")
    parser.add_argument("--factor", type=float, default=8.0)
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="the first is the trained one")
    parser.add_argument("--books", type=int, default=10)
    parser.add_argument("--places", type=int, default=2, help="of each book")
    parser.add_argument("--scored", type=int, default=256, help="tokens of a place")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1")
    parser.add_argument("--num-trials", type=int, default=4, help="passkeys at each length and depth")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", action="store_true", help="only tables and picture of the methods that are there")
    return parser.parse_args()


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return what must agree for results to be of one run."""
    known = {key: getattr(given, key) for key in ("factor", "lengths", "books", "places", "scored", "depths")}
    return {**known, "num_trials": given.num_trials, "seed": given.seed}


def file_of(given: argparse.Namespace, method: str) -> Path:
    """Return where a method's result is."""
    return Path(given.output / f"{re.sub(r'[^a-z0-9.]+', '-', method)}.json")


def measure(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """Return the result of one method: NLL of every place at every length, and passkeys."""
    import torch

    started = time.perf_counter()
    lengths = [int(length) for length in given.lengths.split(",")]
    rope = {} if method == "none" else {"method": method, "factor": given.factor}
    model = longext.load(given.model, device=given.device, dtype=given.dtype, threads=torch.get_num_threads(), **rope)
    documents = load_documents(Perplexity(model="", data=given.data, max_documents=given.books))
    places = []
    for document in documents:
        ids = model.encode(document.text, add_bos=False)
        for place in range(given.places):
            end = max(lengths) + place * given.scored
            assert len(ids) >= end, f"{document.id} has {len(ids)} tokens, {end} are needed"
            windows = [torch.tensor([ids[end - length : end]]) for length in lengths]
            scores = [model.score(window, window.shape[1] - given.scored).nll for window in windows]
            nll = {str(length): float(own.double().mean()) for length, own in zip(lengths, scores, strict=True)}
            places.append({"book": document.id, "nll": nll})
    settings = {"lengths": lengths, "num_trials": given.num_trials, "seed": given.seed}
    depths = [float(depth) for depth in given.depths.split(",")]
    passkey = longext.evaluate(model, "passkey", depths=depths, **settings).record
    return {
        "method": method,
        "command": command(),
        "versions": versions(),
        "model": model.describe(),
        "settings": settings_of(given),
        "data_sha256": data_hash(documents),
        "num_tokens": len(places) * given.scored,
        "places": places,
        "passkey": {key: passkey[key] for key in ("protocol", "results", "by_length")},
        "seconds": time.perf_counter() - started,
    }


def by_book(result: dict[str, Any], length: int) -> np.ndarray:
    """Return the mean NLL of each book at a length, float64 [books]."""
    books: dict[str, list[float]] = {}
    for place in result["places"]:
        books.setdefault(place["book"], []).append(place["nll"][str(length)])
    return np.array([np.mean(values) for values in books.values()])


def change(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return the change of perplexity of `one` against `other`, with its interval over books."""
    found = {"change": math.expm1(float((one - other).mean()))}
    if len(one) < _ENOUGH:
        return found
    low, high = paired_interval(one - other)
    return {**found, "change_low": math.expm1(low), "change_high": math.expm1(high)}


def summarise(results: dict[str, dict[str, Any]], lengths: list[int]) -> list[dict[str, Any]]:
    """Return a row for each method: perplexity and passkeys by length, price, and changes against window and YaRN."""
    base, trained = results["none"], lengths[0]
    rows = []
    for name, result in results.items():
        last = result["passkey"]["by_length"][-1]
        against = results.get("yarn", base)
        rows.append(
            {
                "name": name,
                "perplexity": [{"length": n, "ppl": math.exp(by_book(result, n).mean())} for n in lengths],
                "price": change(by_book(result, trained), by_book(base, trained)),
                "against_window": change(by_book(result, lengths[-1]), by_book(base, trained)),
                "against_yarn": {str(n): change(by_book(result, n), by_book(against, n)) for n in lengths},
                "passkey": last,
                "passkey_by_length": result["passkey"]["by_length"],
                "seconds": result["seconds"],
                "is_checkpoint": name.partition(":")[0] in longext.ROPE_METHODS,
                "is_control": name in ("none", "window"),
                "beaten_by": None,
            }
        )
    return rows


def percent(cell: dict[str, float]) -> str:
    """Return a change with its interval."""
    span = f" ({cell['change_low']:+.1%} to {cell['change_high']:+.1%})" if "change_low" in cell else ""
    return f"{cell['change']:+.1%}{span}"


def tables(rows: list[dict[str, Any]], lengths: list[int], window: float) -> list[Table]:
    """Return perplexity by length with the price, changes against YaRN, and passkeys."""
    trained, far = lengths[0], lengths[1:]
    shown = [f"{length:,}" for length in lengths]
    texts = [[row["name"], *(number(each["ppl"]) for each in row["perplexity"]), percent(row["price"])] for row in rows]
    against = [
        [row["name"], *(percent(row["against_yarn"][str(n)]) for n in far), percent(row["against_window"])]
        for row in rows
    ]
    keys = [
        [row["name"], *(f"{c['accuracy']:.0%} ({c['low']:.0%}-{c['high']:.0%})" for c in row["passkey_by_length"])]
        for row in rows
    ]
    note = f"the same tokens with that much text in front; a raw window of {trained:,} tokens has {number(window)}"
    return [
        Table("Perplexity by context length", ["method", *shown, f"price at {trained:,}"], texts, caption=note),
        Table(
            "Change of perplexity against YaRN at the same length, and of the longest against the raw window",
            ["method", *(f"{n:,}, YaRN" for n in far), f"{lengths[-1]:,}, window"],
            against,
            caption="in brackets the paired 95% interval over books",
        ),
        Table("Passkeys", ["method", *shown], keys, caption="in brackets the 95% Wilson interval"),
    ]


def show(given: argparse.Namespace) -> None:
    """Write summary.json, table.md and bands.png of the methods that are there, and print the tables."""
    lengths = [int(length) for length in given.lengths.split(",")]
    files = {name: file_of(given, name) for name in given.methods.split(",")}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    assert "none" in results, "`none` is measured first: the others are compared with it"
    assert len({json.dumps(each["settings"]) for each in results.values()}) == 1, "results of different settings"
    rows = summarise(results, lengths)
    made = tables(rows, lengths, rows[0]["perplexity"][0]["ppl"])
    text = "\n".join(table.to_markdown() for table in made)
    print(text)
    (given.output / "table.md").write_text(text, encoding="utf-8")
    (given.output / "summary.json").write_text(dump_json(rows) + "\n", encoding="utf-8")
    drawn = [row for row in rows if row["name"] != "none"]
    figure = advice_figures({"methods": drawn, "target_length": lengths[-1], "trained_length": lengths[0]})["advice"]
    figure.savefig(given.output / "bands.png")


def main() -> None:
    """Measure what is not there yet, then show everything."""
    given = arguments()
    given.output.mkdir(parents=True, exist_ok=True)
    for method in [] if given.tables else given.methods.split(","):
        file = file_of(given, method)
        if file.is_file():
            continue
        result = measure(given, method)
        file.write_text(dump_json(result) + "\n", encoding="utf-8")
        print(f"{method}: {result['seconds']:.0f} s", flush=True)
    show(given)


if __name__ == "__main__":
    main()
