"""How much faster evaluations are than a plain loop over prompts, one at a time: the same answers, ratios of one run.

    python benchmarks/eval_throughput.py [MODEL] [--loads generated scored] [--scale 1]

Loads: a needle grid that is generated (five depths), a passkey grid that is scored and ranked by likelihood, and
prompts of mixed lengths whose answers stop early, as LongBench's do. Seconds are the process's own on a CPU (one
thread), of the wall clock on a GPU. MODEL is a directory, a Hub id or books-5m; texts are the bundled story's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longext.checkpoint.bundled import SAMPLE_DOCUMENT
from longext.evals.passkey import Prompts
from longext.evals.suites.needle import Needle
from longext.evals.suites.passkey import Passkey
from longext.models.answers import Request, generate_predictions, load_of
from longext.models.continuations import Continuations, first_choices
from longext.models.hf import HFLanguageModel, load_language_model
from longext.models.throughput.cost import expected_cost
from longext.models.throughput.prefixes import sharing_order
from longext.options import RuntimeConfig


def seconds_of(model: HFLanguageModel, call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and what it returns."""
    is_cpu = model.device.type == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter
    if not is_cpu:
        torch.cuda.synchronize()
    started = clock()
    result = call()
    if not is_cpu:
        torch.cuda.synchronize()
    return clock() - started, result


def needle_requests(model: HFLanguageModel, scale: float) -> list[Request]:
    """Return a needle grid: one task, one length, five depths."""
    length = int(1024 * scale)
    task = Needle(
        model="m", tasks=("single",), lengths=(length,), depths=(0.0, 0.25, 0.5, 0.75, 1.0), num_trials=4,
        max_new_tokens=16,
    )  # fmt: skip
    return [Request(each.id, each.input_ids, 16) for each in task.questions(model, None)]


def mixed_requests(model: HFLanguageModel, scale: float) -> list[Request]:
    """Return prompts of 64 to 768 tokens (log-uniform), whose answers end with a sentence or at 64 tokens."""
    ids, rng = model.encode(SAMPLE_DOCUMENT.read_text(encoding="utf-8")), np.random.default_rng(0)
    requests = []
    for number in range(24):
        size = int(scale * 64 * 12 ** rng.random())
        start = int(rng.integers(0, len(ids) - size))
        requests.append(Request(str(number), (*model.prefix, *ids[start : start + size]), 64, stop=(".", "\n\n")))
    return requests


def generated(model: HFLanguageModel, requests: Sequence[Request]) -> dict[str, Any]:
    """Return seconds of both ways of answering requests, and how many answers are the same."""
    plain, alone = seconds_of(
        model, lambda: [generate_predictions(model, [each], None, batch_tokens=1)[0] for each in requests]
    )
    model.pace = None
    fast, together = seconds_of(model, lambda: generate_predictions(model, requests, None))
    cost = expected_cost(model, load_of(requests), None)
    return {
        **facts([each.input_ids for each in requests], plain, fast),
        "num_new_tokens": sum(each.num_new_tokens for each in alone),
        "num_at_once": cost.num_at_once,
        "expected_seconds_at_most": cost.seconds,
        "num_same_answers": sum(a == b for a, b in zip(alone, together, strict=True)),
    }


def scored(model: HFLanguageModel, scale: float) -> dict[str, dict[str, Any]]:
    """Return the same of a passkey grid whose answers are scored, and whose keys are ranked (a fifth of it)."""
    lengths = tuple(int(scale * length) for length in (256, 512, 1024))
    grid = Prompts(model, Passkey(model="m", lengths=lengths))
    prompts = [grid.make(trial) for trial in grid.trials]
    pairs = [(each.input_ids, each.answer_ids) for each in prompts]
    plain, alone = seconds_of(model, lambda: [first_choices(model, [pair], 1)[0] for pair in pairs])
    fast, together = seconds_of(model, lambda: first_choices(model, pairs, 1))
    exact = facts([ids for ids, _ in pairs], plain, fast)
    exact["num_same_answers"] = sum(bool((a == b).all()) for a, b in zip(alone, together, strict=True))

    encode = lambda key: model.encode(f" {key}", add_bos=False)  # noqa: E731
    chosen = prompts[::5]
    choices = [[each.answer_ids, *map(encode, each.wrong)] for each in chosen]
    order, _ = sharing_order([each.input_ids for each in chosen])

    def one_by_one() -> list[int]:
        reader = Continuations(model)
        reader.reads_once = True
        rows = []
        for each, own in zip(chosen, choices, strict=True):
            assert reader._reader is not None
            reader._reader.forget()
            rows.append(int(np.argmin(reader._one_by_one(each.input_ids, own))))
        return rows

    def packed() -> list[int]:
        reader = Continuations(model)
        rows = {i: int(np.argmin(reader.nll(chosen[i].input_ids, choices[i]))) for i in order}
        return [rows[i] for i in range(len(chosen))]

    plain, alone = seconds_of(model, one_by_one)
    fast, together = seconds_of(model, packed)
    ranked = facts([each.input_ids for each in chosen], plain, fast)
    ranked["num_same_answers"] = sum(a == b for a, b in zip(alone, together, strict=True))
    return {"passkey grid, scored": exact, "passkey grid, ranked": ranked}


def facts(texts: Sequence[Sequence[int]], plain: float, fast: float) -> dict[str, Any]:
    """Return what all loads have."""
    _, kept = sharing_order(texts)
    return {
        "num_prompts": len(texts),
        "num_read_tokens": sum(map(len, texts)),
        "num_shared_tokens": sum(kept),
        "plain_seconds": plain,
        "seconds": fast,
        "times_as_fast": plain / fast,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="books-5m")
    parser.add_argument("--out", default="docs/results/throughput")
    parser.add_argument("--scale", type=float, default=1.0, help="of every length")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--loads", nargs="+", default=["generated", "scored"], choices=["generated", "scored"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = load_language_model(RuntimeConfig(model=chosen.model, dtype=chosen.dtype))
    generate_predictions(model, mixed_requests(model, 0.2)[:1], None)  # what only the first call does
    loads = {}
    if "generated" in chosen.loads:
        loads["needle grid, generated"] = generated(model, needle_requests(model, chosen.scale))
        loads["mixed lengths, early stops"] = generated(model, mixed_requests(model, chosen.scale))
    if "scored" in chosen.loads:
        loads |= scored(model, chosen.scale)
    packages = ("longext", "torch", "transformers")
    record = {
        "command": " ".join(["python", "benchmarks/eval_throughput.py", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "model": model.describe(),
        "clock": "process" if model.device.type == "cpu" else "wall",
        "loads": loads,
    }
    out = Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{Path(chosen.model).name}-{model.device.type}-{'-'.join(chosen.loads)}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, load in loads.items():
        print(
            f"{name:<27} {load['num_prompts']:>4} prompts {load['num_read_tokens']:>8,} tokens"
            f" {load['plain_seconds']:>7.1f} s -> {load['seconds']:>6.1f} s {load['times_as_fast']:>6.2f}x"
            f"  same {load['num_same_answers']}"
        )
    print(file)


if __name__ == "__main__":
    main()
