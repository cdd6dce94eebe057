"""Training text of short and long documents for mixed windows: books and passkey drills, in whole rows.

    python benchmarks/passkey_drills.py MODEL --books BOOKS --rows 140 --out drills.jsonl
    python benchmarks/passkey_drills.py MODEL --books BOOKS --rows 32 --mix "drill:1*6 book:1*4" --edges 0.4 \\
        --seed 7 --out second.jsonl

Each row of --length tokens holds documents of one size with the tokenizer of MODEL (BOS and EOS included), so that rows
cut from the file hold whole documents. --mix says which, in turn: "drill:2*3" is three rows of two drills, "book:8*6"
six rows of eight pieces of books. Half of the drills hide the key in the landmark test's filler, half in the text of a
book, at any depth; --edges is the share of those at the beginning or the end.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longext.checkpoint.load import load_tokenizer
from longext.checkpoint.source import resolve_model
from longext.evals.passkey_prompts import FILLER, NEEDLE, QUESTION, TASK, draw_keys

MIX = "drill:1*8 drill:2*2 drill:4*1 drill:8*1 book:8*6 book:1*2"
_ENDS = 2  # BOS and EOS


class Texts:
    """Texts of exactly so many tokens, drawn from books.

    Args:
        books: token ids of each.
    """

    def __init__(self, tokenizer: Any, books: list[list[int]], longest: int, seed: int, edges: float) -> None:
        self.tokenizer, self.books, self.rng, self.edges = tokenizer, books, np.random.default_rng(seed), edges
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
            if self.edges and self.rng.random() < self.edges:
                depth = round(depth)
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


def rows(texts: Texts, length: int, mix: str, count: int) -> Iterator[str]:
    """Yield the documents of `count` rows."""
    kinds: list[tuple[str, int]] = []
    for part in mix.split():
        name, share, times = re.fullmatch(r"(drill|book):(\d+)\*(\d+)", part).groups()  # type: ignore[union-attr]
        kinds += [(name, int(share))] * int(times)
    for row in range(count):
        name, share = kinds[row % len(kinds)]
        yield from (getattr(texts, name)(length // share) for _ in range(share))


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", type=Path, required=True, help="folder of text files")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument(
        "--mix", default="drill:1*8 drill:2*2 drill:4*1 drill:8*1 book:8*6 book:1*2", help="kinds of rows"
    )
    parser.add_argument("--edges", type=float, default=0.0, help="share of drills with the key at either end")
    parser.add_argument("--rows", type=int, default=140)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model(given.model))
    paths = sorted(given.books.glob("*.txt"))
    books = [tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False) for path in paths]
    texts = Texts(tokenizer, books, given.length, given.seed, given.edges)
    with given.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in rows(texts, given.length, given.mix, given.rows))


if __name__ == "__main__":
    main()
