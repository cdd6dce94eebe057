"""What a frozen model makes of a budget of keys and values: every memory at equal bytes, on the same places of books.

The next segment after C tokens is scored, given what each method keeps of them in `--slots` positions a head and layer
(sink, slots and raw tokens counted alike): raw window, streaming, KV policies, attention matching, thinned raw keys and
trained memories at one ratio, fading and hybrid; beside no memory, all raw tokens that the window holds, and full
attention of the model extended by YaRN. Where the slots of a method cannot be the budget exactly they are the most
below it, and the table says how many.

    python benchmarks/equal_bytes.py MODEL --data BOOKS --slots 257 --length 2048 -o docs/results/equal-bytes/27m.json
    python benchmarks/equal_bytes.py MODEL --data BOOKS --slots 257 --length 2048 -o out.json --train OTHER_BOOKS

--train adds what is trained, each on as many tokens, three seeds: anchors at drawn ratios and at ratios by distance,
read at the lowest ratio that fits, fading and beside raw tokens; and two controls that remember nothing: a constant
prefix, and LoRA for the reader of raw tokens. --in-front adds a fading anchor that is trained as it is read: on
documents of the length, with its raw tokens in front. Their rows are means over the seeds. A run goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from records import run_longext

import longext
from longext.compressor.architectures import COMPRESSORS
from longext.compressor.backbone import Backbone
from longext.compressor.reading.readers import Reader, load_reader
from longext.compressor.schedule import Schedule, spelled
from longext.compressor.spec import CompressorSpec
from longext.errors import ConfigError
from longext.evals.memory.controls import Texts
from longext.evals.memory.efficiency import bytes_per_position
from longext.evals.memory.next_segment import choose_places, gather_texts
from longext.evals.statistics import bootstrap_mean
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig
from longext.untrusted import read_text

RATIOS = (4, 8, 16, 32)
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
    parser.add_argument("--train", help="a folder of books to train on; none: nothing is trained")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="of --train-batch documents of twelve segments")
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--in-front", default="", help="ratios by distance of an anchor trained with its raw tokens")
    parser.add_argument("--work", default="out/equal-bytes", help="where what is trained goes")
    parser.add_argument("--skip", default="", help="rows that are left out, comma-separated beginnings of names")
    parser.add_argument("-o", "--output", required=True)
    given = parser.parse_args()
    if given.in_front and not (given.train and "," in given.in_front):
        parser.error("--in-front takes two ratios or more, the nearest first, and needs --train")
    return given


def train(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    """Train `name` with `seed` unless it is there; return its directory."""
    output = Path(arguments.work, f"{Path(arguments.model).name}-{name}-{seed}")
    if (output / "run.json").is_file():
        return output
    shared = ["--data", arguments.train, "--seed", seed, "-o", output]
    shared += ["--lora-r", 64, "--lora-alpha", 128, "--learning-rate", 1e-3, "--set", "warmup_steps=4"]
    shared += ["--set", "checkpointing=false", "--set", "weight_decay=0", "--save-every", 8]
    shared += ["--resume"] if output.with_name(output.name + ".running").is_dir() else []
    tokens, steps = 12 * arguments.segment, arguments.steps
    if name == "lora":  # reads as many raw tokens as the budget in front of a segment
        row = arguments.slots + arguments.segment
        rows = round(arguments.train_batch * tokens / row)
        command = ["finetune", arguments.model, "--method", "none", "--target-length", row, "--attention", "full"]
        command += ["--tuning", "lora", "--batch-size", rows, "--accumulation", 1, *shared]
    else:
        fading = ["--fading"] if name.startswith("anchor-fading") else []
        ratios, raw = RATIOS, 0
        if name.endswith("-in-front"):
            ratios = in_front(arguments)
            length, raw = arguments.length + arguments.segment, most_raw(arguments, ratios)
            steps, tokens = round(arguments.steps * tokens / length), length
        command = ["compress-train", arguments.model, "--arch", name.partition("-")[0], "--segment", arguments.segment]
        command += ["--ratio", spelled(ratios), *fading, "--overlap", raw, "--document-length", tokens]
        command += ["--objectives", "lm", "--batch-size", arguments.train_batch, *shared]
    run_longext(*command, "--num-steps", steps)
    return output


def in_front(arguments: argparse.Namespace) -> tuple[int, ...]:
    """Return the ratios by distance of the anchor that is trained with its raw tokens in front."""
    return tuple(map(int, arguments.in_front.split(",")))


def trained_readers(arguments: argparse.Namespace) -> dict[str, Callable[[int], tuple[str, str]]]:
    """Return for each row's name a function of the seed: (model, memory) to read with."""
    slots = arguments.slots

    def memory(name: str, sizes: str) -> Callable[[int], tuple[str, str]]:
        return lambda seed: (arguments.model, f"{train(arguments, name, seed)}@{sizes}")

    def adapted(seed: int) -> tuple[str, str]:
        adapter = train(arguments, "lora", seed)
        merged = adapter.with_name(adapter.name + "-merged")
        if not merged.is_dir():
            longext.merge(adapter, output=merged)
        return str(merged), f"window:{slots}"

    uniform = next(ratio for ratio in RATIOS if fits(arguments, (ratio,), 0))
    found = {f"anchor@{uniform}": memory("anchor", str(uniform))}
    found[f"prefix@{uniform} (control)"] = memory("prefix", str(uniform))
    for first in range(len(RATIOS)):
        ratios = RATIOS[first:]
        name, one = spelled(ratios), ratios[:1]
        if fits(arguments, one, 1):
            found[f"anchor@{one[0]} and raw tokens"] = memory("anchor", f"{one[0]}+{most_raw(arguments, one)}")
        if len(ratios) > 1 and fits(arguments, ratios, 1):
            sizes = f"{name}+{most_raw(arguments, ratios)}"
            found[f"anchor-fading@{name}"] = memory("anchor-fading", sizes)
            found[f"anchor read fading@{name}"] = memory("anchor", sizes)
    if arguments.in_front:
        ratios = in_front(arguments)
        for first in range(len(ratios) - 1):  # nested: it is read at the last ratios alone too
            name = spelled(ratios[first:])
            sizes = f"{name}+{most_raw(arguments, ratios[first:])}"
            found[f"anchor-fading with raw tokens@{name}"] = memory("anchor-fading-in-front", sizes)
    return found | {"LoRA, raw window (control)": adapted}


def fits(arguments: argparse.Namespace, ratios: tuple[int, ...], raw: int) -> bool:
    """Tell whether memories of these ratios, a sink and so many raw tokens are within the budget."""
    spec = CompressorSpec(arch="anchor", segment=arguments.segment, ratios=ratios, sink=1, overlap=raw)
    schedule = Schedule.of(COMPRESSORS["anchor"], spec, ratios)
    return schedule.num_readable(arguments.length // arguments.segment) <= arguments.slots


def most_raw(arguments: argparse.Namespace, ratios: tuple[int, ...]) -> int:
    """Return how many raw tokens fit the budget beside memories of these ratios."""
    return next(raw for raw in range(arguments.slots, 0, -1) if fits(arguments, ratios, raw))


def extended(arguments: argparse.Namespace) -> Path:
    """Return the model extended by YaRN to all tokens of context and the segment, untrained."""
    length = arguments.length + 2 * arguments.segment
    output = Path(arguments.work, f"{Path(arguments.model).name}-yarn-{length}")
    if not output.is_dir():
        longext.extend(arguments.model, "yarn", target_length=length, output=output)
    return output


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
    asked = record.get("arguments", {}).get("memory", [])  # of runs before: their rows stay
    record |= {
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("output", "work", "train")}
        | {"model": Path(arguments.model).name},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "books": [path.stem for path in names],
        "num_places": len(places),
        "bytes_per_position": bytes_per_position(Backbone(plain.model)),
    }
    record["arguments"] |= {"model": Path(arguments.model).name, "data": Path(arguments.data).name}
    record["arguments"]["memory"] = list(dict.fromkeys([*asked, *arguments.memory]))
    rows = {row["memory"]: row for row in record["rows"]}

    def add(name: str, readers: Sequence[tuple[str, str]]) -> None:
        """Score one method, with every seed; its row is their mean."""
        scores, started = [], time.process_time()
        for model, spec in readers:
            here = dataclasses.replace(config, model=model)
            reader = load_reader(here, spec, segment=None if "@" in spec else arguments.segment)
            scores.append(score(reader, texts, arguments))
        means = np.stack([one.mean(1) for one in scores])
        rows[name] = {
            "memory": name,
            "slots": kept(reader, arguments.length),
            "nll": float(means.mean()),
            "seeds": means.mean(1).tolist(),
            "seconds": time.process_time() - started,
            "per_place": means.mean(0).tolist(),
        }
        record["rows"] = list(rows.values())
        compare(record, owners)
        print_rows(record, [name])
        save(record, output)

    skipped = tuple(filter(None, arguments.skip.split(",")))
    for spec in methods(arguments):
        if spec not in rows and not spec.startswith(skipped):
            try:
                add(spec, [(arguments.model, spec)])
            except ConfigError as error:  # a pyramid needs room for its widest layer
                print(f"{spec}: {error}", flush=True)
    if "full attention" not in rows and not "full attention".startswith(skipped):
        add("full attention", [(str(extended(arguments)), f"window:{arguments.length}")])
    for name, reader_of in trained_readers(arguments).items() if arguments.train else ():
        if name not in rows and not name.startswith(skipped):
            add(name, [reader_of(seed) for seed in range(arguments.seeds)])
    compare(record, owners)
    save(record, output)
    print("\n| memory | slots | MiB | perplexity | difference (interval) | CPU s |\n|:--|--:|--:|--:|:--|--:|")
    print_rows(record, [row["memory"] for row in sorted(record["rows"], key=lambda row: row["nll"])])


def score(reader: Reader, texts: Texts, arguments: argparse.Namespace) -> np.ndarray:
    """Return nats per token of every place, float64 [places, tokens]."""
    nll = []
    for first in range(0, len(texts.segments), arguments.batch):
        rows = slice(first, first + arguments.batch)
        ids = torch.cat([texts.contexts[rows], texts.segments[rows]], 1)
        nll.append(reader.score(ids, arguments.length + 1).nll.double())
    return torch.cat(nll).numpy()


def save(record: dict, output: Path) -> None:
    """Write the record, so that a run that is stopped goes on where it was."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


def compare(record: dict, owners: np.ndarray) -> None:
    """Add to each row its perplexity and its difference from the raw window of equal bytes, over books."""
    rows = {row["memory"]: row for row in record["rows"]}
    window = np.array(rows.get(window_of(record), record["rows"][0])["per_place"])
    for row in rows.values():
        difference = np.array(row["per_place"]) - window
        sums = np.array([difference[owners == book].sum() for book in np.unique(owners)])
        counts = np.array([(owners == book).sum() for book in np.unique(owners)], dtype=np.float64)
        low, high = bootstrap_mean(sums, counts, num_samples=2000, seed=0) or (0.0, 0.0)
        row |= {"ppl": float(np.exp(row["nll"])), "difference": float(difference.mean()), "low": low, "high": high}


def window_of(record: dict) -> str:
    """Return the name of the row that the others are compared with."""
    return f"window:{record['arguments']['slots']}"


def print_rows(record: dict, names: Sequence[str]) -> None:
    """Print rows of the table, the CPU seconds for one seed."""
    for row in (row for name in names for row in record["rows"] if row["memory"] == name):
        name = f"**{row['memory']}**" if row["memory"] == window_of(record) else row["memory"]
        size = f"{record['bytes_per_position'] * row['slots'] / 2**20:.2f}"
        difference = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        seconds = round(row["seconds"] / len(row["seeds"]))
        print(f"| {name} | {row['slots']:,} | {size} | {row['ppl']:.2f} | {difference} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
