"""Training text with passkeys at many distances: books, and drills that fill whole rows.

    python benchmarks/passkey_drills.py MODEL --books BOOKS --length 4096 --out drills.jsonl

A row's worth of drills is one of the row's length, two of half of it, or four of a quarter. Half of the drills hide the
key in the landmark test's filler, half in the text of a book. Each is exactly its length with the tokenizer of MODEL, so
that rows of --length tokens cut from the file hold whole drills; keys are drawn from --seed. The books follow, whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from longext.checkpoint.load import load_tokenizer
from longext.checkpoint.source import resolve_model
from longext.evals.passkey_prompts import FILLER, NEEDLE, QUESTION, TASK, draw_keys


def drill(tokenizer: Any, length: int, filler: str, rng: np.random.Generator) -> str:
    """Return a text of exactly `length` tokens with BOS and EOS: task, filler with a key, question and answer."""
    (key,), depth = draw_keys(rng, 1, 5), rng.random()
    ids = tokenizer.encode(filler, add_special_tokens=False)[:length]
    room = length - 120
    for _ in range(200):
        body, cut = tokenizer.decode(ids[:room]), round(depth * room)
        before = tokenizer.decode(ids[:cut])
        parts = (TASK, before, NEEDLE.format(key=key), body[len(before) :], f"{QUESTION} {key}.")
        text = "\n".join(part.strip() for part in parts)
        missing = length - 2 - len(tokenizer.encode(text, add_special_tokens=False))
        if missing == 0:
            return text
        room += missing
    return drill(tokenizer, length, filler, rng)  # tokens at the seams merge: another depth


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", type=Path, required=True, help="folder of text files")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=120, help="rows of drills")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    tokenizer, rng = load_tokenizer(resolve_model(given.model)), np.random.default_rng(given.seed)
    books = [path.read_text(encoding="utf-8") for path in sorted(given.books.glob("*.txt"))]
    landmark = " ".join([FILLER] * (given.length // 10))
    with given.out.open("w", encoding="utf-8") as file:
        for row in range(given.rows):
            share = 2 ** (row % 3)
            for _ in range(share):
                book = books[int(rng.integers(len(books)))]
                start = int(rng.integers(max(1, len(book) - 8 * given.length)))
                filler = landmark if rng.random() < 0.5 else book[start : start + 8 * given.length]
                file.write(json.dumps({"text": drill(tokenizer, given.length // share, filler, rng)}) + "\n")
        file.writelines(json.dumps({"text": book}) + "\n" for book in books)


if __name__ == "__main__":
    main()
