"""What the first loss of a run tells of its RoPE: right methods and wrong rotations, in nats above the base's loss.

    python benchmarks/first_loss.py MODEL ... --data BOOK --tokens 1024 [--json FILE]

Each model reads the first tokens of a text under every method at factors 2 to 32, and with rotary modules that were
made wrong after loading. docs/longlora.md explains what `longext finetune` makes of it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint import _built
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import extended_config, plan_extension
from longext.models.hf import load_language_model
from longext.options import RuntimeConfig

FACTORS = (2, 4, 8, 16, 32)
METHODS = ("linear", "ntk", "ntk-by-parts", "yarn", "dynamic", "abf", "llama3")


def theta_of(length: int, theta: float) -> torch.Tensor:
    """Return plain frequencies, float32 [length]."""
    return theta ** -(torch.arange(length) / length)


WRONG = {
    "the extension lost": lambda old: old,
    "linear 8 applied twice": lambda old: old / 64,
    "theta 100": lambda old: theta_of(len(old), 100.0),
    "theta 10,000": lambda old: theta_of(len(old), 10_000.0),
    "order reversed": lambda old: old.flip(0),
    "no rotation": torch.zeros_like,
    "frequencies in bfloat16": lambda old: old.to(torch.bfloat16).float(),
}


def measure(name: str, data: Path, num_tokens: int) -> dict[str, Any]:
    """Return the base's loss in nats, and what each method and each wrong rotation adds to it."""
    model = load_language_model(RuntimeConfig(model=name, device="cpu", threads=1, dtype="float32"))
    text = data.read_text(encoding="utf-8")[2000 : 2000 + 8 * num_tokens]  # behind the title pages
    ids, raw = torch.tensor([model.encode(text)[:num_tokens]]), model.config
    vocabulary = model.model.get_output_embeddings().weight.shape[0]

    def loss() -> float:
        return float(model.score(ids, 1).nll.mean())

    base, theta = loss(), model.model.config.rope_parameters["rope_theta"]
    right: dict[str, dict[int, float]] = {}
    for method in METHODS:
        right[method] = {}
        for factor in FACTORS:
            extra = {"rope_theta": theta * factor**1.2} if method == "abf" else {}
            model.set_rope(
                extended_config(plan_extension(ExtendConfig(model=name, method=method, factor=factor, **extra)))
            )
            right[method][factor] = loss() - base
    wrong = {}
    for label, change in WRONG.items():
        model.set_rope(raw)
        for module in _built.rotary_modules(model.model).values():
            module.inv_freq = change(module.inv_freq)
        wrong[label] = loss() - base
    return {"model": name, "tokens": num_tokens, "base": base, "uniform": math.log(vocabulary)} | {
        "right": right,
        "wrong": wrong,
    }


def main() -> None:
    """Measure every model and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True, help="of each model, or one number for all")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokens = given.tokens * (len(given.models) if len(given.tokens) == 1 else 1)
    found = [measure(name, given.data, count) for name, count in zip(given.models, tokens, strict=True)]
    names = [f"{Path(each['model']).name} ({each['base']:.2f})" for each in found]
    print(f"| | {' | '.join(names)} |\n|:--|{'--:|' * len(found)}")
    for method in METHODS:
        cells = (" / ".join(f"{each['right'][method][n]:.2f}" for n in FACTORS) for each in found)
        print(f"| {method} | {' | '.join(cells)} |")
    for label in WRONG:
        print(f"| {label} | {' | '.join(format(each['wrong'][label], '.2f') for each in found)} |")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
