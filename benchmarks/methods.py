"""The tables of docs/methods.md and docs/engines.md that are made from the package and from stored results.

    python benchmarks/methods.py            # print them
    python benchmarks/methods.py --write    # put them into the pages, in the place of the old ones

Names, ideas and sources are the registries'; engines are those of docs/engines.md; price and reach are of books-27m at
factor 8, from docs/results/books-27m and bands/books-27m (`benchmarks/bands.py`), "not run" if neither has them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longext.attention.bands import REMAPS
from longext.conversion.engines import RIGHT, serving_engines
from longext.report.commands.engines import engine_tables, methods_by_kind
from longext.report.tables import Table
from longext.rope.spec import ROPE_METHODS, extension_methods

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
REACHED = 0.75  # share of passkeys that counts as reached
TRAINED = 512


def measured() -> dict[str, tuple[float, int | None]]:
    """Return (price at the trained length, longest length at which passkeys are found) by method."""
    found: dict[str, tuple[float, int | None]] = {}
    record = json.loads((RESULTS / "books-27m" / "result.json").read_text(encoding="utf-8"))
    plain = _at_trained(record["methods"][0])
    for method in record["methods"]:
        found[method["name"]] = _at_trained(method) / plain - 1, _reach(method["passkey_by_length"])
    summary = RESULTS / "bands" / "books-27m" / "summary.json"
    for row in json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else []:
        found.setdefault(row["name"], (row["price"]["change"], _reach(row["passkey_by_length"])))
    return found


def _at_trained(method: Mapping[str, Any]) -> float:
    return float(next(row["ppl"] for row in method["perplexity"] if row["length"] == TRAINED))


def _reach(rows: Any) -> int | None:
    """Return the longest length up to which every length reaches the share; None if the shortest does not."""
    reached = None
    for row in rows:
        if row["accuracy"] < REACHED:
            break
        reached = row["length"]
    return reached


def methods_table() -> Table:
    """Return every method with what it needs, what reads it, its price and its reach."""
    numbers = measured()
    kinds = {name.split("`")[1]: kind for kind, names in reversed(methods_by_kind().items()) for name in names}
    rows = []
    for name in extension_methods():
        engines = [each.name for each in serving_engines() if each.reading(kinds[name]).verdict == RIGHT]
        method = ROPE_METHODS[name]
        rows.append([name, ROPE_METHODS.summary(name), "no", _engines(engines), method.reference])
    for name in REMAPS:
        rows.append([name, REMAPS.summary(name), "yes", "no checkpoint", REMAPS[name].reference])
    return Table(
        "Every method",
        ["method", "idea", "changes attention", "serving engines", "price at 512", "reach", "source"],
        [
            [f"`{name}`", _sentence(idea), changes, engines, *_numbers(name, numbers), source]
            for name, idea, changes, engines, source in rows
        ],
        left=frozenset(range(7)),
        caption=f"price: change of perplexity at the trained {TRAINED} tokens; reach: the longest of 512, 1,024, 2,048 "
        f"and 4,096 tokens up to which {REACHED:.0%} of passkeys are found; books-27m, factor 8, no training.",
    )


def _sentence(text: str) -> str:
    return text.partition(": ")[2] or text


def _engines(names: list[str]) -> str:
    current = [each.name for each in serving_engines()]
    return "all of today" if names == current else ", ".join(names) or "none (transformers)"


def _numbers(name: str, numbers: Mapping[str, tuple[float, int | None]]) -> tuple[str, str]:
    """Return price and reach, of the variant that was measured; both forms of `dynamic`."""
    variants = [each for each in numbers if each.partition(":")[0] == name]
    if not variants:
        return "not run", "not run"
    texts = [(f" ({each.partition(':')[2]})" if ":" in each else "", *numbers[each]) for each in variants]
    prices = "; ".join(f"{price:+.1%}{variant}" for variant, price, _ in texts)
    reaches = "; ".join(f"{f'{reach:,}' if reach else 'below 512'}{variant}" for variant, _, reach in texts)
    return prices, reaches


def pages() -> dict[Path, list[Table]]:
    """Return the tables of each page."""
    return {DOCS / "methods.md": [methods_table()], DOCS / "engines.md": engine_tables()}


def write(page: Path, made: Table) -> None:
    """Put a table in the place of the one of the same title."""
    text = page.read_text(encoding="utf-8")
    old = re.compile(rf"\*\*{re.escape(made.title)}\*\*\n\n(\|.*\n)+" + (r"\n.+\n" if made.caption else ""))
    assert old.search(text), f"{page.name} has no table '{made.title}'"
    page.write_text(old.sub(lambda _: made.to_markdown(), text), encoding="utf-8")


if __name__ == "__main__":
    for page, tables in pages().items():
        for made in tables:
            if "--write" in sys.argv:
                write(page, made)
            else:
                print(made.to_markdown())
