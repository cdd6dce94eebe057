"""A small model reads a whole book through its memory: resident bytes, time per token, and a number hidden in the text.

Trains a compressor to answer for a pass key hidden in book text (from --init, or from nothing), asks it at several
distances inside and beyond what its window can hold, then lets one session read a whole book in pieces and measures
time and bytes as it goes, beside full attention over as much of the book.

    python benchmarks/book_session.py MODEL --train BOOKS --book BOOK.txt --init COMPRESSOR -o results/session
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


def main() -> None:
    """Train, ask, read; write session.json and session.png."""
    arguments = parse()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    trained = train(arguments, output)
    torch.set_num_threads(1)
    from longext.compressor.checkpoint import load_compressor

    loaded = load_compressor(trained, device="cpu")
    text = Path(arguments.book).read_text(encoding="utf-8")
    accuracy = ask_by_distance(loaded, arguments, text)
    reading, answer = read_book(loaded, arguments, text)
    full = time_full_attention(loaded, text, [r["tokens"] for r in reading if r["tokens"] <= arguments.full_to])
    record = {"accuracy": accuracy, "reading": reading, "answer": answer, "full_attention": full}
    (output / "session.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(record, output / "session.png")
    print_tables(record)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", required=True, help="folder of books to hide keys in")
    parser.add_argument("--book", required=True, help="an unseen book")
    parser.add_argument("--init", help="start from this compressor")
    parser.add_argument("-o", "--output", default="results/session")
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--examples", type=int, default=2400)
    parser.add_argument("--longest", type=int, default=5000, help="characters of the longest example")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--trials", type=int, default=20, help="questions for each distance")
    parser.add_argument("--full-to", type=int, default=32_768, help="longest context for full attention")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_examples(arguments: argparse.Namespace, path: Path) -> None:
    """Write supervised examples: book text with one key somewhere, the question and its answer."""
    rng = random.Random(arguments.seed)
    books = [file.read_text(encoding="utf-8") for file in sorted(Path(arguments.train).iterdir())]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(arguments.examples):
            book, size = rng.choice(books), rng.randint(600, arguments.longest)
            start = rng.randrange(len(book) - size)
            text, cut, key = book[start : start + size], rng.randrange(size), rng.randint(10_000, 99_999)
            context = text[:cut] + NEEDLE.format(key=key) + text[cut:]
            row = {"instruction": context, "output": f"{QUESTION.strip()} {key}."}
            file.write(json.dumps(row) + "\n")


def train(arguments: argparse.Namespace, output: Path) -> Path:
    """Train on the answers alone unless it is done; return the compressor's directory."""
    trained, data = output / "compressor", output / "passkeys.jsonl"
    if (trained / "compressor.json").is_file():
        return trained
    write_examples(arguments, data)
    command = [
        sys.executable, "-m", "longext", "compress-train", arguments.model, "--arch", "anchor", "--data", data,
        "--objectives", "qa", "--prompt", "plain", "--segment", arguments.segment, "--ratio", arguments.ratio,
        "--document-length", 12 * arguments.segment, "--lora-r", 64, "--lora-alpha", 128,
        "--batch-size", arguments.batch_size, "--num-steps", arguments.num_steps,
        "--learning-rate", arguments.learning_rate, "--seed", arguments.seed, "--save-every", 50,
        "--set", "checkpointing=false", "--set", "warmup_steps=20", "--set", "weight_decay=0", "-o", trained,
    ]  # fmt: skip
    command += ["--init", arguments.init] if arguments.init else []
    command += ["--resume"] if trained.with_name("compressor.running").is_dir() else []
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return trained


def ask(session, tokenizer) -> int | None:
    """Return the number that the session answers with."""
    question = tokenizer(QUESTION, add_special_tokens=False).input_ids
    found = re.search(r"\d+", tokenizer.decode(session.ask(question, 8)))
    return int(found.group()) if found else None


def ask_by_distance(loaded, arguments: argparse.Namespace, text: str) -> list[dict]:
    """Return accuracy by the tokens between the key and the question, inside the window's memory and beyond."""
    from longext.compressor.reading.session import Session
    from longext.evals.statistics import wilson_interval

    tokenizer, spec = loaded.tokenizer, loaded.compressor.spec
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    rng, rows = random.Random(arguments.seed + 1), []
    held = spec.max_segments(loaded.compressor.backbone.window, arguments.ratio) - 1
    for segments in (1, held // 4, held // 2, 3 * held // 4, held - 1, held + 2):
        correct = 0
        for _ in range(arguments.trials):
            key, distance = rng.randint(10_000, 99_999), segments * spec.segment + rng.randrange(spec.segment // 2)
            needle = tokenizer(NEEDLE.format(key=key), add_special_tokens=False).input_ids
            start = rng.randrange(len(ids) - 2 * distance - 600)
            before = ids[start : start + 512 + rng.randrange(spec.segment)]
            after = ids[start + 700 : start + 700 + distance]
            session = Session.of(loaded, ratio=arguments.ratio)
            session.absorb([*before, *needle, *after])
            correct += ask(session, tokenizer) == key
        low, high = wilson_interval(correct, arguments.trials)
        rows.append(
            {"tokens_back": segments * spec.segment, "held": segments < held, "accuracy": correct / arguments.trials}
            | {"low": low, "high": high, "trials": arguments.trials}
        )
    return rows


def read_book(loaded, arguments: argparse.Namespace, text: str) -> tuple[list[dict], dict]:
    """Read the whole book with a key near its end, a piece at a time; return what it took, and the answer."""
    from longext.compressor.reading.session import Session

    tokenizer, spec = loaded.tokenizer, loaded.compressor.spec
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    key = random.Random(arguments.seed + 2).randint(10_000, 99_999)
    place = len(ids) - 5 * spec.segment
    ids[place:place] = tokenizer(NEEDLE.format(key=key), add_special_tokens=False).input_ids
    session, rows, seconds = Session.of(loaded, ratio=arguments.ratio), [], 0.0
    marks = [2**n for n in range(10, 20) if 2**n < len(ids)] + [len(ids)]
    for mark in marks:
        while session.num_tokens < mark:
            piece = ids[session.num_tokens : min(mark, session.num_tokens + 1024)]
            started = time.process_time()
            session.absorb(piece)
            seconds += time.process_time() - started
        rows.append(
            {"tokens": mark, "seconds": seconds, "slots": session.num_slots, "bytes": session.num_bytes}
            | {"resident_mb": resident_megabytes()}
        )
    started = time.process_time()
    answer = ask(session, tokenizer)
    return rows, {"key": key, "answer": answer, "seconds": time.process_time() - started, "tokens": len(ids)}


def resident_megabytes() -> float:
    """Return the resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss / 1e6


@torch.no_grad()
def time_full_attention(loaded, text: str, lengths: list[int]) -> list[dict]:
    """Return the time and KV bytes of one prefill of the plain model at each length."""
    from transformers import DynamicCache

    model = loaded.compressor.backbone.model
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    rows = []
    for length in lengths:
        cache = DynamicCache(config=model.config)
        started = time.process_time()
        model.model(input_ids=torch.tensor([ids[:length]]), past_key_values=cache, use_cache=True)
        seconds = time.process_time() - started
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        rows.append({"tokens": length, "seconds": seconds, "bytes": size})
    return rows


def draw(record: dict, path: Path) -> None:
    """Draw seconds per token and resident KV bytes by tokens read."""
    from longext.report.plots import INK, new_figure, save_png, style

    figure = new_figure(9.2, 3.6)
    time_panel, bytes_panel = figure.subplots(1, 2)
    ways = (("full attention", record["full_attention"], "#d55e00"), ("session", record["reading"], "#0072b2"))
    for name, rows, colour in ways:
        tokens = [row["tokens"] for row in rows]
        per_token = [1e3 * row["seconds"] / row["tokens"] for row in rows]
        time_panel.plot(tokens, per_token, marker="o", markersize=3.5, color=colour, label=name)
        bytes_panel.plot(
            tokens, [row["bytes"] / 1e6 for row in rows], marker="o", markersize=3.5, color=colour, label=name
        )
    bytes_panel.set_yscale("log")
    ticks = [row["tokens"] for row in record["reading"]][:-1:2]
    for panel, label in ((time_panel, "ms per token read (CPU time)"), (bytes_panel, "keys, values and memory, MB")):
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left")
        style(panel, "", "tokens read", label)
    time_panel.set_ylim(0)
    save_png(figure, path)


def print_tables(record: dict) -> None:
    """Print everything in Markdown."""
    print("\n| key, tokens back | held by the window | answered |\n|--:|:--|--:|")
    for row in record["accuracy"]:
        interval = f"({row['low']:.0%} to {row['high']:.0%}, {row['trials']} questions)"
        print(f"| {row['tokens_back']:,} | {'yes' if row['held'] else 'no'} | {row['accuracy']:.0%} {interval} |")
    full = {row["tokens"]: row for row in record["full_attention"]}
    print("\n| tokens read | session: s | slots | memory, kB | process, MB | full attention: s | KV, kB |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for row in record["reading"]:
        plain = full.get(row["tokens"])
        other = f"{plain['seconds']:.1f} | {plain['bytes'] / 1e3:,.0f}" if plain else " | "
        size = f"{row['slots']:,} | {row['bytes'] / 1e3:,.0f} | {row['resident_mb']:,.0f}"
        print(f"| {row['tokens']:,} | {row['seconds']:.1f} | {size} | {other} |")
    answer = record["answer"]
    print(f"\nAfter {answer['tokens']:,} tokens: key {answer['key']}, answer {answer['answer']}.")


if __name__ == "__main__":
    main()
