"""A hundred thousand tokens in a window of 4,096: a trained memory beside a raw window and KV policies of its bytes.

    python benchmarks/far_memory.py books-5m --books BOOKS --eval-books OTHER_BOOKS -o docs/results/far/books-5m

The model is extended to 4,096 tokens and trained on passkey drills and books, so that it can use far text at all; an
anchor is trained on it to answer drills of 384 tokens at --memory-ratios, then, if two are given, drills and pieces of
books; with --more-steps then after 2,048 tokens at ratios by distance, 4x to 32x. Memories of no more slots than the
window holds read 1,024 to 100,096 tokens with a key in them: is it found, is it the likeliest of ten, what does what
follows in a book cost, how many bytes are held, how long does it take. The trained memory reads at 4x and is thinned
as it fills. A stage that is finished is not run again; a training that was stopped goes on from its last checkpoint.
Writes far.json, far.png and table.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from records import command, run_longext

from longext.compressor.backbone import Backbone
from longext.compressor.reading.readers import load_reader
from longext.compressor.reading.session import Session
from longext.evals.memory.efficiency import bytes_per_position
from longext.evals.passkey_prompts import QUESTION
from longext.manifest import versions
from longext.options import RuntimeConfig
from longext.report.plots import INK, new_figure, save_png, style
from longext.report.tables import Table, number

SEGMENT = 128
CHUNK = 512  # tokens that policies read at once
DRILLS = {  # rows of tokens, what is in them, seed
    "base": (4096, "drill:1*6 drill:2*2 book:1*4", 4),
    "memory": (384, "drill:1*1", 5),
    "memory-2": (384, "drill:1*2 book:1*1", 7),
    "memory-more": (17 * SEGMENT, "drill:1*5 drill:4*1 book:1*2", 6),
}
FOLLOWS = 40  # words of a book that are asked for, given all before them


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", required=True, help="folder of texts to train on")
    parser.add_argument("--eval-books", type=Path, required=True, help="folder of texts to measure on")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/far"), help="where models go")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--lengths", default="1024,8192,32768,100096")
    parser.add_argument("--base-steps", type=int, default=60, help="of 2 rows of the window")
    parser.add_argument("--memory-steps", default="500", help="on drills; 200/100: then on drills and books")
    parser.add_argument("--memory-batch", type=int, default=16, help="drills of a step")
    parser.add_argument("--memory-ratios", default="4,8", help="of each stage: 4,8/8,16,32")
    parser.add_argument("--more-steps", type=int, default=0, help="of 8 drills and pieces of books of 2,176 tokens")
    parser.add_argument("--num-trials", type=int, default=2, help="passkeys of a length and depth")
    parser.add_argument("--depths", default="0,0.5")
    parser.add_argument("--documents", type=int, default=4, help="books that perplexity is measured on")
    parser.add_argument("--places", type=int, default=2, help="of each book")
    parser.add_argument("--skip", default="", help="memories that are left out, comma-separated beginnings of names")
    parser.add_argument("--policy-text", action="store_true", help="perplexity of KeyDiff and SnapKV as well (slow)")
    given = parser.parse_args()
    num_stages = given.memory_steps.count("/") + 1
    if num_stages != given.memory_ratios.count("/") + 1 or num_stages > 2:
        parser.error("--memory-steps and --memory-ratios take one stage or two, as many of both: 400/120 and 4,8/8,16")
    return given


def drills(given: argparse.Namespace, name: str, rows: int) -> Path:
    """Return a file of training texts: whole documents for the base, prompts and answers for the memory."""
    file = given.work / f"{name}.jsonl"
    length, mix, seed = DRILLS[name]
    if file.is_file():
        return file
    asked = [sys.executable, Path(__file__).with_name("passkey_drills.py"), given.model, "--books", given.books]
    asked += ["--length", length, "--mix", mix, "--edges", 0.3, "--rows", rows, "--seed", seed, "--out", file]
    subprocess.run(list(map(str, asked)), check=True)
    if name != "base":
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
        file.write_text("".join(json.dumps(asked_of(text)) + "\n" for text in texts), encoding="utf-8")
    return file


def asked_of(text: str) -> dict[str, str]:
    """Return a prompt and what has to come: the key of a drill, the last words of a piece of a book."""
    words = text.rsplit(" ", 1 if QUESTION in text else FOLLOWS)
    return {"prompt": words[0], "completion": " " + " ".join(words[1:])}


def prepare(given: argparse.Namespace) -> tuple[Path, Path]:
    """Return the model that reads the window and the compressor on it; both are trained unless they are there."""
    base, adapter = (given.work / name for name in ("base", "adapter"))
    shared = ["--learning-rate", 1e-3, "--set", "checkpointing=false", "--set", "warmup_steps=8", "--save-every", 10]

    def resume(output: Path) -> list[str]:
        return ["--resume"] if output.with_name(f"{output.name}.running").is_dir() else []

    if not base.is_dir():
        run_longext(
            "finetune", given.model, "--method", "yarn", "--target-length", given.window, "--separate-documents",
            "--data", drills(given, "base", given.base_steps * 2), "--attention", "full", "--tuning", "lora",
            "--lora-r", 16, "--lora-alpha", 32, "--batch-size", 1, "--accumulation", 2,
            "--num-steps", given.base_steps, "--schedule", "linear", *shared, *resume(adapter), "-o", adapter,
        )  # fmt: skip
        subprocess.run([sys.executable, "-m", "longext", "merge", str(adapter), "-o", str(base)], check=True)
    stages: list[tuple[str, int, int, str, list[Any]]] = []  # name, steps, documents of a step, ratios, words more
    for steps, ratios in zip(given.memory_steps.split("/"), given.memory_ratios.split("/"), strict=True):
        before = ["--init", given.work / stages[-1][0]] if stages else []
        stages.append(
            (f"memory-{len(stages) + 1}" if stages else "memory", int(steps), given.memory_batch, ratios, before)
        )
    if given.more_steps:
        more = ["--fading", "--init", given.work / stages[-1][0]]
        stages.append(("memory-more", given.more_steps, 8, "4,8,16,32", more))
    for name, steps, size, ratios, more in stages:
        if not (given.work / name).is_dir():
            run_longext(
                "compress-train", base, "--arch", "anchor", "--data", drills(given, name, steps * size), "--num-steps",
                steps, "--objectives", "qa", "--prompt", "plain", "--segment", SEGMENT, "--ratio", ratios, *more,
                "--document-length", DRILLS[name][0], "--lora-r", 64, "--lora-alpha", 128, "--batch-size", size,
                "--set", "weight_decay=0", *shared, *resume(given.work / name), "-o", given.work / name,
            )  # fmt: skip
    return base, given.work / stages[-1][0]


def stage(given: argparse.Namespace, name: str, *words: Any) -> dict[str, Any]:
    """Return the record of one evaluation and its CPU seconds; it is run unless it is there."""
    folder = given.work / "runs" / name
    seconds = folder / "seconds.json"
    if not seconds.is_file():
        seconds.write_text(json.dumps(run_longext(*words, "-o", folder, "--force")))
        print(f"{name}: {json.loads(seconds.read_text()):.0f} CPU s", flush=True)
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {**record, "cpu_seconds": json.loads(seconds.read_text())}


def memories(given: argparse.Namespace, memory: Path) -> dict[str, str | None]:
    """Return what `--memory` reads, by name; None: full attention, where it fits."""
    room = given.window - CHUNK
    found = {
        "full attention": None,
        "trained, 4x and thinned": f"{memory}@4",
        "raw keys, 4x and thinned": "thinned:4",
        "raw window": f"window:{room}",
        "keydiff": f"keydiff:{room}",
        "keydiff and the newest": f"keydiff:{room - CHUNK}+{CHUNK}",
        "snapkv": f"snapkv:{room}",
    }
    skipped = tuple(filter(None, given.skip.split(",")))
    return {name: spec for name, spec in found.items() if not name.startswith(skipped)}


def read_on(base: Path, spec: str, book: Path, lengths: list[int]) -> list[dict[str, float]]:
    """Return CPU seconds, slots and bytes of one session that reads a text, at each length."""
    reader = load_reader(RuntimeConfig(model=str(base), device="cpu", dtype="float32"), spec, segment=chunk_of(spec))
    ids = reader.plain.encode(book.read_text(encoding="utf-8"), add_bos=False)
    session, rows, seconds, done = reader.session(), [], 0.0, 0
    position = bytes_per_position(Backbone(reader.plain.model))
    for length in lengths:
        while done < length:
            piece = ids[done : min(length, done + 2048)]
            started = time.process_time()
            session.absorb(piece)
            seconds, done = seconds + time.process_time() - started, done + len(piece)
        slots = session.num_slots if isinstance(session, Session) else reader.num_readable(done)
        rows.append({"tokens": done, "seconds": seconds, "slots": slots, "bytes": slots * position})
    return rows


def chunk_of(spec: str | None) -> int | None:
    """Return `--segment` of a memory: what policies read at once, None if it has its own."""
    return None if spec is None or "@" in spec else SEGMENT if spec.startswith("thinned") else CHUNK


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return keys found, perplexity, time and bytes by length for every memory."""
    base, memory = prepare(given)
    book = max(given.eval_books.iterdir(), key=lambda path: path.stat().st_size)
    found: dict[str, Any] = {}
    for name, spec in memories(given, memory).items():
        lengths = [n for n in map(int, given.lengths.split(",")) if spec or n <= given.window]
        reads, sizes = ["--memory", spec] if spec else [], ["--lengths", ",".join(map(str, lengths))]
        chunk = ["--segment", chunk_of(spec)] if chunk_of(spec) else []
        label = "".join(c if c.isalnum() else "-" for c in name)
        slow = name.startswith(("keydiff", "snapkv"))  # minutes for each 100,000 tokens: generated answers alone
        asks = ["--depths", given.depths, "--num-trials", given.num_trials]
        asks += ["--answers", "generate" if slow else "both"]
        keys = stage(given, f"{label}-passkey", "passkey", base, *sizes, *reads, *chunk, *asks)
        found[name] = {"memory": spec and spec.replace(str(memory), "OUT"), "passkey": keys}
        if spec:
            if given.policy_text or not slow:
                sizes = ["--lengths", "1024,8192,32768"] if slow else sizes  # policies read 128 tokens at once here
                texts = ["--data", given.eval_books, "--max-documents", given.documents, "--num-places", given.places]
                found[name]["ppl"] = stage(given, f"{label}-ppl", "eval", "ppl", base, *sizes, *reads, *texts)
            reading = given.work / "runs" / f"{label}-reading.json"
            if not reading.is_file():
                reading.write_text(json.dumps(read_on(base, spec, book, lengths)))
            found[name]["reading"] = json.loads(reading.read_text())
    return found


def table_of(found: dict[str, Any]) -> Table:
    """Return a row for every memory and length."""
    rows = []
    for name, one in found.items():
        ppl = {r["length"]: r for r in one["ppl"]["results"] if r["method"] == "memory"} if "ppl" in one else {}
        read = {r["tokens"]: r for r in one.get("reading", ())}
        ranks = {r["length"]: r for r in one["passkey"].get("ranked_by_length", ())}
        for cell in one["passkey"]["by_length"]:
            length = cell["length"]
            share = f"{cell['num_correct']} of {cell['num_trials']} ({cell['low']:.0%}-{cell['high']:.0%})"
            first = f"{ranks[length]['score']:.0%}" if length in ranks else "-"
            row = [name, f"{length:,}", share, first, number(ppl[length]["ppl"]) if length in ppl else "-"]
            held = read.get(length)
            sizes = (f"{held['slots']:,}", f"{held['bytes'] / 2**20:.1f}", f"{held['seconds']:.1f}") if held else "---"
            rows.append([*row, *sizes])
    heads = ["memory", "tokens", "keys found", "likeliest of ten", "perplexity of what follows", "slots", "MiB held"]
    heads.append("CPU s to read")
    return Table("Reading far in a bounded memory", heads, rows, caption="in brackets Wilson's 95% interval")


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw keys found, perplexity, bytes and time by tokens read."""
    colours = dict(
        zip(found, ("#000000", "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#e69f00", "#cc79a7"), strict=False)
    )
    figure = new_figure(12.0, 6.4)
    panels = figure.subplots(2, 3).flatten()
    found_panel, rank_panel, ppl_panel, bytes_panel, time_panel, names = panels
    for name, one in found.items():
        line = {"marker": "o", "markersize": 4, "color": colours[name], "label": name}
        cells = one["passkey"]["by_length"]
        found_panel.plot([c["length"] for c in cells], [100 * c["accuracy"] for c in cells], **line)
        ranks = one["passkey"].get("ranked_by_length", [])
        rank_panel.plot([c["length"] for c in ranks], [100 * c["score"] for c in ranks], **line)
        rows = [r for r in one["ppl"]["results"] if r["method"] == "memory"] if "ppl" in one else []
        ppl_panel.plot([r["length"] for r in rows], [r["ppl"] for r in rows], **line)
        read = one.get("reading", [])
        bytes_panel.plot([r["tokens"] for r in read], [r["bytes"] / 2**20 for r in read], **line)
        time_panel.plot([r["tokens"] for r in read], [r["seconds"] for r in read], **line)
    labels = ("keys found, %", "key is likeliest of ten, %", "perplexity of the next segment", "MiB held")
    for panel, label in zip(panels[:5], (*labels, "CPU s to read"), strict=True):
        if panel is not time_panel:  # time over tokens is a straight line on plain axes
            panel.set_xscale("log", base=2)
        ticks = [1024, 8192, 32768, 100096] if panel is not time_panel else [0, 32768, 65536, 100096]
        panel.set_xticks(ticks, [f"{tick / 1000:.0f}k" for tick in ticks], minor=False)
        style(panel, "", "tokens read", label)
    found_panel.set_ylim(-3, 103)
    rank_panel.set_ylim(-3, 103)
    bytes_panel.set_ylim(0)
    time_panel.set_ylim(0)
    names.axis("off")
    names.legend(*found_panel.get_legend_handles_labels(), frameon=False, fontsize=9, labelcolor=INK, loc="center")
    save_png(figure, path)


def main() -> None:
    """Train, measure, write."""
    given = arguments()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    given.output.mkdir(parents=True, exist_ok=True)
    found = measure(given)
    record = {"command": command(), "versions": versions(), "settings": vars(given), "memories": found}
    (given.output / "far.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    (given.output / "table.md").write_text(table_of(found).to_markdown(), encoding="utf-8")
    draw(found, given.output / "far.png")


if __name__ == "__main__":
    main()
