"""What engines make of the checkpoints that longext writes: perplexity beside transformers, on the same token ids.

    python benchmarks/engines.py make out/engines                      # where longext is: checkpoints and a reference
    python benchmarks/engines.py measure out/engines --engine mlx      # where mlx-lm is (a CPU will do)
    python benchmarks/engines.py measure out/engines --engine transformers     # another version of transformers

`make` extends books-5m by 8 under every setting of SETTINGS and scores 2,048 tokens of the bundled story in float32 in
one pass with the transformers that is installed. `measure` needs no longext; it adds ENGINE-VERSION.json beside
reference.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, FACTOR = 2048, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ntk": {},
    "ntk-by-parts": {},
    "yarn": {},
    "dynamic": {"alpha": 8.0},
    "llama3": {},
    "ntk-by-parts, code ramp": {"ramp": "code"},
    "yarn, paper ramp": {"ramp": "paper"},
    "longrope": {"factors": "factors.json"},
}


def make(out: Path) -> None:
    """Write the checkpoints, the token ids and what this transformers makes of them."""
    import longext
    from longext.checkpoint.bundled import BUNDLED_MODELS, SAMPLE_DOCUMENT
    from longext.checkpoint.load import load_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    base = BUNDLED_MODELS["books-5m"]
    ids = load_tokenizer(base)(SAMPLE_DOCUMENT.read_text(encoding="utf-8"))["input_ids"][:LENGTH]
    (out / "ids.json").write_text(json.dumps(ids))
    rising = [1 + i / 4 for i in range(32)]  # divisors of the 32 dimension pairs, beyond the trained length
    (out / "factors.json").write_text(json.dumps({"long_factor": rising}))
    for name, settings in SETTINGS.items():
        if "factors" in settings:
            settings = {"factors": str(out / settings["factors"])}
        method, options = name.partition(",")[0], {"factor": FACTOR, **settings}
        longext.extend(base, method, output=folder(out, name), force=True, **options)
    measure(out, "transformers", "reference.json")


def folder(out: Path, name: str) -> Path:
    """Return where the checkpoint of a setting is."""
    return out / name.replace(", ", "-").replace(" ", "-")


def with_transformers(directory: Path, ids: list[int]) -> np.ndarray:
    """Return float64 logits [T, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].double().numpy()
    return logits


def with_mlx(directory: Path, ids: list[int]) -> np.ndarray:
    """Return float64 logits [T, V]."""
    import mlx.core as mx
    from mlx_lm.utils import load

    model = load(str(directory))[0]
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)


def version_of(engine: str) -> str:
    """Return the version of an engine that is installed."""
    if engine == "mlx":
        import mlx_lm

        return str(mlx_lm.__version__)
    import transformers

    return str(transformers.__version__)


ENGINES: dict[str, Callable[[Path, list[int]], np.ndarray]] = {"transformers": with_transformers, "mlx": with_mlx}


def measure(out: Path, engine: str, file: str | None = None) -> None:
    """Write the perplexity of every checkpoint, and how far its logits are from those of the reference."""
    ids = json.loads((out / "ids.json").read_text())
    rows: list[dict[str, Any]] = []
    for name in SETTINGS:
        row: dict[str, Any] = {"setting": name}
        store = folder(out, name).with_suffix(".npy")
        try:
            logits = ENGINES[engine](folder(out, name), ids)
        except Exception as error:  # an engine may refuse in any way: what it says is the result
            rows.append({**row, "refused": f"{type(error).__name__}: {error}"[:200]})
            continue
        best = logits.max(-1, keepdims=True)
        losses = (best[:, 0] + np.log(np.exp(logits - best).sum(-1)))[:-1] - logits[np.arange(LENGTH - 1), ids[1:]]
        row["ppl"] = math.exp(losses.mean())
        if file:
            np.save(store, logits.astype(np.float32))
        else:
            row["largest_difference"] = float(np.abs(logits - np.load(store)).max())
        rows.append(row)
        print(row, flush=True)
    record = {"engine": engine, "version": version_of(engine), "length": LENGTH, "factor": FACTOR, "results": rows}
    (out / (file or f"{engine}-{record['version']}.json")).write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["make", "measure"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="transformers")
    given = parser.parse_args()
    if given.step == "make":
        make(given.out)
    else:
        measure(given.out, given.engine)


if __name__ == "__main__":
    main()
