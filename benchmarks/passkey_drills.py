"""Training text of short and long documents for mixed windows: books and passkey drills, in whole rows.

    python benchmarks/passkey_drills.py MODEL --books BOOKS --length 4096 --short 512 --rows 140 --out drills.jsonl

Each row of --length tokens holds whole documents of one size with the tokenizer of MODEL (BOS and EOS included), so that
rows cut from the file hold whole documents: of twenty rows, eight are one passkey drill of --length, two are two of
half of it, one is four of a quarter, one is drills of --short tokens, six are pieces of books of --short tokens and two
are one piece of a book of --length. Half of the drills hide the key in the landmark test's filler, half in the text of
a book.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longext.checkpoint.load import load_tokenizer
from longext.checkpoint.source import resolve_model
from longext.evals.passkey_prompts import FILLER, NEEDLE, QUESTION, TASK, draw_keys

_ENDS = 2  # BOS and EOS


class Texts:
    """Texts of exactly so many tokens, drawn from books.

    Args:
        books: token ids of each.
    """

    def __init__(self, tokenizer: Any, books: list[list[int]], longest: int, seed: int) -> None:
        self.tokenizer, self.books, self.rng = tokenizer, books, np.random.default_rng(seed)
        self.landmark = self._encode(" ".join([FILLER] * (longest // 10)))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _filler(self, length: int) -> list[int]:
        book = self.books[int(self.rng.integers(len(self.books)))]
        start = int(self.rng.integers(len(book) - length))
        return book[start : start + length]

    def book(self, length: int) -> str:
        """Return a piece of a book."""
        while True:
            text: str = self.tokenizer.decode(self._filler(length - _ENDS))
            if len(self._encode(text)) == length - _ENDS:
                return text

    def drill(self, length: int) -> str:
        """Return the landmark test's task, a text with a key, the question and its answer."""
        while True:  # tokens at the seams may merge: then another draw
            (key,), depth = draw_keys(self.rng, 1, 5), self.rng.random()
            filler = self.landmark if self.rng.random() < 0.5 else self._filler(length)
            ends = [TASK, NEEDLE.format(key=key), f"{QUESTION} {key}."]
            room = length - _ENDS - len(self._encode("\n".join(ends)))
            for _ in range(4):
                cut = round(depth * room)
                halves = [self.tokenizer.decode(ids).strip() for ids in (filler[:cut], filler[cut:room])]
                text = "\n".join([ends[0], halves[0], ends[1], halves[1], ends[2]])
                missing = length - _ENDS - len(self._encode(text))
                if missing == 0:
                    return text
                room += missing


def rows(texts: Texts, length: int, short: int, count: int) -> Iterator[str]:
    """Yield the documents of `count` rows."""
    kinds = [(texts.drill, length)] * 8 + [(texts.drill, length // 2)] * 2 + [(texts.drill, length // 4)]
    kinds += [(texts.drill, short)] + [(texts.book, short)] * 6 + [(texts.book, length)] * 2
    for row in range(count):
        make, size = kinds[row % len(kinds)]
        yield from (make(size) for _ in range(length // size))


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", type=Path, required=True, help="folder of text files")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--short", type=int, default=512, help="tokens of a short document")
    parser.add_argument("--rows", type=int, default=140)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model(given.model))
    paths = sorted(given.books.glob("*.txt"))
    books = [tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False) for path in paths]
    texts = Texts(tokenizer, books, given.length, given.seed)
    with given.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in rows(texts, given.length, given.short, given.rows))


if __name__ == "__main__":
    main()
