"""The before and after of the README: a text written beyond the trained length, and a picture of measured figures.

    python benchmarks/readme.py --model ../shared/models/books-27m \\
        --book ../shared/books/test/stevenson-treasure-island.txt -o docs/results/readme      # writes text.json
    python benchmarks/readme.py --picture docs/images/before-after.png    # of docs/results/bands/books-27m

The text is the first one drawn with seed 0 for each model: the same 3,072 tokens of a novel that it was not trained on
in front, temperature 0.8, top-p 0.9.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import longext
from longext.manifest import versions
from longext.report.results import dump_json

MEASURED = Path(__file__).parents[1] / "docs" / "results" / "bands" / "books-27m" / "summary.json"
SHOWN = {
    "none": ("as trained (512 tokens)", "#8a8f98"),
    "yarn": ("YaRN, a standard checkpoint", "#d97706"),
    "leaky-rerope:logn=true": ("Leaky ReRoPE, at run time", "#0f766e"),
}
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--book", type=Path)
    parser.add_argument("--factor", type=float, default=8.0)
    parser.add_argument("--context", type=int, default=3072, help="tokens of the book that are read first")
    parser.add_argument("--new", type=int, default=60, help="tokens that are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/readme"))
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def write_text(given: argparse.Namespace, method: str, book: str) -> dict[str, Any]:
    """Return what the model writes under `method` after the beginning of `book`."""
    import torch

    changed = {} if method == "none" else {"method": method, "factor": given.factor}
    model: Any = longext.load(given.model, device="cpu", **changed)
    ids = model.encode(book)[: given.context]
    torch.manual_seed(given.seed)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        out = model.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=given.new, **_SAMPLING
        )
    written = model.decode(out[0, len(ids) :].tolist())
    return {"method": method, "read": len(ids), "ends_with": model.decode(ids[-40:]), "text": written}


def write_texts(given: argparse.Namespace) -> None:
    """Write `text.json`: what each model wrote, the command and the versions."""
    book = given.book.read_text(encoding="utf-8")
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "model": Path(given.model).name,
        "book": given.book.name,
        "book_sha256": hashlib.sha256(book.encode()).hexdigest(),
        "seed": given.seed,
        "sampling": _SAMPLING,
        "dtype": "float32",
        "texts": [write_text(given, method, book) for method in SHOWN],
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "text.json").write_text(dump_json(record), encoding="utf-8")
    for text in record["texts"]:
        print(f"{text['method']}: {text['text']!r}\n")


def draw(file: Path) -> None:
    """Draw perplexity and passkeys by length from the stored measurement: side by side, and for a phone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    for end, shape, size, columns in (("", (1, 2), (8.4, 3.6), 3), ("-phone", (2, 1), (4.2, 6.2), 1)):
        figure, panels = plt.subplots(*shape, figsize=size, layout="constrained")
        _draw_panels(*panels)
        figure.get_layout_engine().set(w_pad=0.1, hspace=0.06)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        drawn = file.with_stem(file.stem + end)
        figure.savefig(drawn, dpi=160)
        print(drawn)


def _draw_panels(left: Any, right: Any) -> None:
    found = {row["name"]: row for row in json.loads(MEASURED.read_text(encoding="utf-8"))}
    for name, (label, colour) in SHOWN.items():
        row, style = found[name], {"color": colour, "marker": "o", "linewidth": 2.4, "markersize": 6}
        losses, keys = row["perplexity"], row["passkey_by_length"]
        left.plot([at["length"] for at in losses], [at["ppl"] for at in losses], label=label, **style)
        right.plot([at["length"] for at in keys], [100 * at["accuracy"] for at in keys], **style)
        low, high = [100 * at["low"] for at in keys], [100 * at["high"] for at in keys]
        right.fill_between([at["length"] for at in keys], low, high, color=colour, alpha=0.12, linewidth=0)
    lengths = [at["length"] for at in found["none"]["perplexity"]]
    for axes, title in ((left, "Perplexity of unseen novels (less is better)"), (right, "Hidden numbers found, in %")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("tokens of text")
        axes.grid(axis="y", color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log")
    left.set_yticks([30, 50, 100, 200, 300], ["30", "50", "100", "200", "300"])
    left.minorticks_off()
    left.set_ylim(28, 340)
    right.set_ylim(-4, 104)


def main() -> None:
    """Write the text, or draw the picture."""
    given = arguments()
    if given.picture:
        draw(given.picture)
    else:
        write_texts(given)


if __name__ == "__main__":
    main()
