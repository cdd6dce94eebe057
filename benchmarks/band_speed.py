"""Prefill under position remapping against plain SDPA: seconds and peak memory, both in turn in one process.

    python benchmarks/band_speed.py MODEL --lengths 4096,8192 --output docs/results/bands/speed.json

On a GPU the peak is the allocator's, on a CPU that of tracked tensors; weights are left out of both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from longext.attention.bands import REMAPS
from longext.checkpoint.source import resolve_model
from longext.models.remap import attach
from longext.planning.tracker import MemoryTracker


def main() -> None:
    """Measure every method at every length; write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="books-5m")
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--methods", default=",".join(REMAPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    is_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if is_cuda else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_model(given.model, None), dtype=dtype).eval()
    model = model.to("cuda" if is_cuda else "cpu")
    rows = []
    for length in map(int, given.lengths.split(",")):
        ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)
        for method in given.methods.split(","):
            rows.append(_compare(model, ids, method, given.repeats))
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "command": f"python benchmarks/band_speed.py {given.model} --lengths {given.lengths} --repeats {given.repeats}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU, {given.threads} thread(s)",
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
    }
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(record, indent=2) + "\n")


@torch.no_grad()
def _compare(model: Any, ids: torch.Tensor, method: str, repeats: int) -> dict[str, Any]:
    """Return medians of plain and remapped seconds, taken in turn, the median of their ratios, and both peaks."""
    length, seconds = ids.shape[1], {"plain": [], method: []}
    peaks = {"plain": _peak(model, ids)}
    remapping = attach(model, method, length, logn=True)
    peaks[method] = _peak(model, ids)
    remapping.detach()
    for _ in range(repeats):
        seconds["plain"].append(_time(model, ids))
        with attach(model, method, length, logn=True):
            seconds[method].append(_time(model, ids))
    ratios = [ours / plain for ours, plain in zip(seconds[method], seconds["plain"], strict=True)]
    return {
        "length": length,
        "method": method,
        "plain_seconds": statistics.median(seconds["plain"]),
        "seconds": statistics.median(seconds[method]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "plain_peak_bytes": peaks["plain"],
        "peak_bytes": peaks[method],
    }


def _time(model: Any, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _peak(model: Any, ids: torch.Tensor) -> float:
    if ids.is_cuda:
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _time(model, ids)
        return float(torch.cuda.max_memory_allocated() - weights)
    with MemoryTracker(model.parameters()) as tracker:
        _time(model, ids)
    return float(tracker.peak)


if __name__ == "__main__":
    main()
