"""Search frequencies for books-27m at 4,096 tokens (8 times its trained length), beside YaRN on held-out books.

    python benchmarks/search.py                       # the curve, at its whole budget
    python benchmarks/search.py curve-quick longrope2-short

Runs are named below. Validation books are searched on, test books and other seeds judge. Writes NAME.json (the record),
NAME.jsonl (every window that was measured) and NAME.png into --out; a run that was cut short goes on from its journal.
Needs ../shared; says so and ends if it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import longext
from longext.report.commands.search import search_table
from longext.report.console import print_table

SHARED = Path(os.path.relpath(Path(__file__).parents[2] / "shared"))  # as a record shall name it
RUNS: dict[str, dict[str, Any]] = {
    "curve": {},
    "curve-quick": {"evaluations": 24, "num_samples": 5},
    "curve-short-price": {"evaluations": 24, "num_samples": 5, "short_price": 0.01},
    "longrope2": {"searcher": "longrope2"},
    "longrope2-short": {"searcher": "longrope2", "evaluations": 48, "num_samples": 2},
}
FILES = {"result.json": "json", "journal.jsonl": "jsonl", "curve.png": "png"}


def main() -> None:
    """Run the searches that are named, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=["curve"], choices=RUNS, metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--work", default="results/search", help="where runs are made")
    parser.add_argument("--out", default="docs/results/search", help="where their records go")
    chosen = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"{SHARED} with the model and the books is not there.")
    out = Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    books = SHARED / "books"
    for name in chosen.runs:
        output = longext.search(
            SHARED / "models" / "books-27m",
            4096,
            data=str(books / "validation"),
            eval_data=str(books / "test"),
            max_documents=9,
            output=Path(chosen.work, name),
            progress=True,
            **RUNS[name],
        )
        for file, ending in FILES.items():
            shutil.copyfile(output / file, out / f"{name}.{ending}")
        print_table(search_table(json.loads((output / "result.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
