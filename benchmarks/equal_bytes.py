"""What a frozen model makes of a budget of keys and values: every memory at equal bytes, on the same places of books.

The next segment after C tokens is scored, given what each method keeps of them in `--slots` positions a head and layer
(sink, slots and raw tokens counted alike): raw window, streaming, KV policies, attention matching, thinned raw keys and
trained memories at one ratio, fading and hybrid; beside no memory, and all raw tokens that the window holds. Where the
slots of a method cannot be the budget exactly they are the most below it, and the table says how many.

    python benchmarks/equal_bytes.py MODEL --data BOOKS --slots 128 --length 2048 -o docs/results/equal-bytes/27m.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from longext.compressor.backbone import Backbone
from longext.compressor.reading.readers import Reader, load_reader
from longext.evals.memory.efficiency import bytes_per_position
from longext.evals.memory.next_segment import choose_places, gather_texts
from longext.evals.statistics import bootstrap_mean
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig
from longext.untrusted import read_text

POLICIES = "snapkv ada-snapkv pyramid-snapkv h2o tova knorm keydiff expected kvzip attention-matching".split()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="a folder of books")
    parser.add_argument("--memory", action="append", default=[], help="a memory more, as eval --memory; repeatable")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024, help="tokens of context")
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--books", type=int, default=8)
    parser.add_argument("--places", type=int, default=12, help="of each book")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", required=True)
    return parser.parse_args()


def methods(arguments: argparse.Namespace) -> list[str]:
    """Return the memories to compare, as `--memory` spells them."""
    slots = arguments.slots
    fixed = ["none", "window", f"window:{slots}", f"transformer-xl:{slots}", f"streaming:4+{slots - 4}"]
    return [*fixed, *(f"{name}:{slots}" for name in POLICIES), *arguments.memory]


def kept(reader: Reader, length: int) -> int:
    """Return the positions that stay readable of so many tokens."""
    if reader.compressor is None:
        return reader.num_readable(length)
    schedule = reader.compressor.schedule(reader.ratio, thins=reader.compressor.nested)
    return schedule.num_readable(length // schedule.segment)


def main() -> None:
    """Score every method on the same places; write the record after each, skip what it has."""
    arguments = parse()
    torch.set_num_threads(1)
    config = RuntimeConfig(model=arguments.model, device="cpu", dtype="float32")
    plain = load_language_model(config)
    names = sorted(path for path in Path(arguments.data).iterdir() if path.suffix == ".txt")[: arguments.books]
    books = [plain.encode(read_text(path), add_bos=False) for path in names]
    places = choose_places(
        [len(b) for b in books], arguments.length, arguments.segment, arguments.places, arguments.seed
    )
    texts = gather_texts(books, places, arguments.length, arguments.segment)
    owners = np.array(texts.groups)
    output = Path(arguments.output)
    record = json.loads(output.read_text()) if output.exists() else {"rows": []}
    record |= {
        "arguments": {k: v for k, v in vars(arguments).items() if k != "output"}
        | {"model": Path(arguments.model).name},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "books": [path.stem for path in names],
        "num_places": len(places),
        "bytes_per_position": bytes_per_position(Backbone(plain.model)),
    }
    record["arguments"] |= {"model": Path(arguments.model).name, "data": Path(arguments.data).name}
    rows = {row["memory"]: row for row in record["rows"]}
    for spec in methods(arguments):
        name = spec.replace(str(Path(spec.partition("@")[0]).parent) + "/", "") if "/" in spec else spec
        if name in rows:
            continue
        reader = load_reader(config, spec, segment=None if "@" in spec else arguments.segment)
        started = time.perf_counter()
        nll = []
        for first in range(0, len(places), arguments.batch):
            rows_of = slice(first, first + arguments.batch)
            ids = torch.cat([texts.contexts[rows_of], texts.segments[rows_of]], 1)
            nll.append(reader.score(ids, arguments.length + 1).nll.double())
        scores = torch.cat(nll).numpy()
        rows[name] = {
            "memory": name,
            "slots": kept(reader, arguments.length),
            "nll": float(scores.mean()),
            "seconds": time.perf_counter() - started,
            "per_place": scores.mean(1).tolist(),
        }
        record["rows"] = list(rows.values())
        print_table(record, owners, only=name)
        save(record, output)
    print_table(record, owners)
    save(record, output)


def save(record: dict, output: Path) -> None:
    """Write the record, so that a run that is stopped goes on where it was."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


def print_table(record: dict, owners: np.ndarray, only: str | None = None) -> None:
    """Add to each row its perplexity and difference from the raw window of equal bytes, over books, and print it."""
    rows = {row["memory"]: row for row in record["rows"]}
    window = np.array(rows.get(f"window:{record['arguments']['slots']}", record["rows"][0])["per_place"])
    for name, row in rows.items():
        if only not in (None, name):
            continue
        difference = np.array(row["per_place"]) - window
        sums = np.array([difference[owners == book].sum() for book in np.unique(owners)])
        counts = np.array([(owners == book).sum() for book in np.unique(owners)], dtype=np.float64)
        low, high = bootstrap_mean(sums, counts, num_samples=2000, seed=0) or (0.0, 0.0)
        row |= {"ppl": float(np.exp(row["nll"])), "difference": float(difference.mean()), "low": low, "high": high}
        size = record["bytes_per_position"] * row["slots"] / 2**20
        print(
            f"| `{name}` | {row['slots']} | {size:.2f} | {row['ppl']:.2f} | {row['difference']:+.4f} "
            f"({low:+.4f} to {high:+.4f}) | {row['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
