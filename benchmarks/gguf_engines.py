"""Every method in llama.cpp beside transformers: perplexity and greedy text at 2 and 8 times the trained length.

    python benchmarks/gguf_engines.py out/gguf                            # books-5m; about two minutes on one core
    python benchmarks/gguf_engines.py out/gguf --smollm2 DIR --file FILE  # and SmolLM2-135M-Instruct

Needs `pip install 'longext[gguf]'`. A model is exported in float32; `longext extend` then makes a .gguf of that file
and a checkpoint of the model. The first runs in llama.cpp, the second in plain transformers, both on the same token ids
of the bundled story. SmolLM2 (trained on 8,192) is extended as if it had been trained on 128 tokens, since eight times
its own length takes hours on a CPU; the engines do the same arithmetic. FILE is its 98 MB .gguf: extending it is timed.
Rows that are in OUT/record.json already are kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

FACTORS, NUM_NEW, SEED = (2, 8), 24, 0
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "abf": ("abf", {"rope_theta": 8.0}),  # times the model's own
    "linear": ("linear", {}),
    "ntk": ("ntk", {}),
    "ntk-by-parts": ("ntk-by-parts", {}),
    "ntk-by-parts, code ramp": ("ntk-by-parts", {"ramp": "code"}),
    "yarn": ("yarn", {}),
    "yarn, paper ramp": ("yarn", {"ramp": "paper"}),
    "yarn, attention_factor 1.1": ("yarn", {"attention_factor": 1.1}),
    "llama3": ("llama3", {}),
    "resonance": ("resonance", {}),
    "cope": ("cope", {}),
    "p-rope": ("p-rope", {}),
    "drope": ("drope", {}),
    "dynamic": ("dynamic", {}),
    "longrope, equal factors": ("longrope", {"factors": "equal.json"}),
    "longrope, factors 1 up to L": ("longrope", {"factors": "long.json"}),
}
FILE_NAME = "record.json"


def options(out: Path, name: str, original: int, factor: int) -> dict[str, Any]:
    """Return what `longext.extend` takes for a setting."""
    method, given = SETTINGS[name]
    if method == "none":
        return {"method": method}
    if "factors" in given:
        rising = [1 + (factor - 1) * i / 31 for i in range(32)]  # divisors of the 32 dimension pairs
        lists = {"long_factor": rising, **({"short_factor": rising} if given["factors"] == "equal.json" else {})}
        given = {"factors": str(out / f"{factor}-{given['factors']}")}
        Path(given["factors"]).write_text(json.dumps(lists))
    return {"method": method, "factor": factor, "original_length": original, **given}


def with_transformers(checkpoint: Path, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    """Return float64 log-probabilities of ids[1:], and the greedy tokens behind ids."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    new: list[int] = []
    with torch.no_grad():
        answer = model(torch.tensor([ids]), use_cache=True)
        scores = log_probabilities(answer.logits[0].numpy(), ids)
        while len(new) < NUM_NEW:
            new.append(int(answer.logits[0, -1].argmax()))
            answer = model(torch.tensor([new[-1:]]), use_cache=True, past_key_values=answer.past_key_values)
    return scores, new


def with_llama_cpp(file: Path, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    """Return float64 log-probabilities of ids[1:], and the greedy tokens behind ids."""
    from longext.conversion.gguf.engine import LlamaCpp

    engine = LlamaCpp(file)
    scores, place = [], 0
    for piece in engine.logits(ids, room=NUM_NEW):
        scores.append(log_probabilities(piece, ids[place : place + len(piece) + 1]))
        place += len(piece)
    new = engine.go_on(NUM_NEW, frozenset())
    engine.close()
    return np.concatenate(scores)[: len(ids) - 1], new


def log_probabilities(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Return float64 log-probabilities of ids[1:] by logits [T, V]."""
    wide = logits[: len(ids) - 1].astype(np.float64)
    best = wide.max(-1)
    return wide[np.arange(len(wide)), ids[1 : len(wide) + 1]] - best - np.log(np.exp(wide - best[:, None]).sum(-1))


def measure(out: Path, record: dict[str, Any], model: str, original: int, names: list[str]) -> None:
    """Add a row for every setting of `names` and factor that is not there yet."""
    import longext
    from longext.checkpoint.bundled import BUNDLED_MODELS, SAMPLE_DOCUMENT
    from longext.checkpoint.load import load_tokenizer
    from longext.checkpoint.rope_config import read_model_rope
    from longext.conversion.config import ExportConfig
    from longext.conversion.gguf.export import export_gguf
    from longext.errors import ConfigError

    source, title = BUNDLED_MODELS.get(model, Path(model)), "books-5m" if model == "books-5m" else "SmolLM2-135M"
    tokens = load_tokenizer(source)(SAMPLE_DOCUMENT.read_text(encoding="utf-8"))["input_ids"]
    base = out / f"{title}.gguf"
    if not base.is_file():
        export_gguf(ExportConfig(format="gguf", model=model, output=str(base), dtype="float32"))
    for name in names:
        for factor in FACTORS:
            row = {"model": title, "setting": name, "factor": factor, "tokens": factor * original}
            if any(all(each[key] == row[key] for key in row) for each in record["results"]):
                continue
            given, ids = options(out, name, original, factor), tokens[: factor * original]
            if "rope_theta" in given:
                given["rope_theta"] *= read_model_rope(source).spec.rope_theta
            checkpoint, file = out / "checkpoint", out / "extended.gguf"
            try:
                longext.extend(base, output=file, force=True, **given)
            except ConfigError as error:
                record["results"].append({**row, "refused": str(error)})
                save(out, record)
                continue
            longext.extend(model, output=checkpoint, force=True, check=False, **given)
            (theirs, text), (ours, own) = with_transformers(checkpoint, ids), with_llama_cpp(file, ids)
            row["ppl_transformers"], row["ppl_llama_cpp"] = (math.exp(-each.mean()) for each in (theirs, ours))
            row["largest_difference"] = float(abs(ours - theirs).max())
            same = [a == b for a, b in zip(own, text, strict=True)]
            row["same_tokens"] = NUM_NEW if all(same) else same.index(False)
            record["results"].append(row)
            save(out, record)
            print(row, flush=True)
    shutil.rmtree(out / "checkpoint", ignore_errors=True)


def time_extension(out: Path, record: dict[str, Any], file: Path) -> None:
    """Add the seconds that `longext.extend` takes for a file, the best of five."""
    import longext

    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        longext.extend(file, "ntk-by-parts", factor=4, output=out / "timed.gguf", force=True)
        seconds.append(time.perf_counter() - start)
    record["extension"] = {"bytes": file.stat().st_size, "seconds": min(seconds), "all": seconds}
    save(out, record)
    print(record["extension"])


def save(out: Path, record: dict[str, Any]) -> None:
    """Write the record."""
    (out / FILE_NAME).write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--smollm2", help="directory of the checkpoint")
    parser.add_argument("--file", type=Path, help="its .gguf")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="a setting; may be repeated")
    given = parser.parse_args()
    chosen = given.only or list(SETTINGS)
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / FILE_NAME
    names = ("llama-cpp-python", "transformers", "torch", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = json.loads(kept.read_text()) if kept.is_file() else {"results": []}
    record.update(versions=versions, dtype="float32", device="cpu", new_tokens=NUM_NEW, text="sample")
    if given.file:
        time_extension(given.out, record, given.file)
    measure(given.out, record, "books-5m", 512, chosen)
    if given.smollm2:
        measure(given.out, record, given.smollm2, 128, chosen)


if __name__ == "__main__":
    main()
