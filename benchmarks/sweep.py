"""A swept S2-Attn step on a CPU: memory against the row's length, time, and how exact its gradient is.

    python benchmarks/sweep.py [--model ../shared/models/books-27m] [--lengths 8192,16384,65536] [--out DIR]

One step (gradient of one row, LoRA with embeddings and norms, layers checkpointed) at each length, swept in chunks of
--chunk tokens with groups of --group, and at the first length in one graph too. Random weights of the model's sizes
where it is not there. Memory: the peak of live tensors, counted operator by operator, weights left out; "halo" is what
the chunks keep for one another. Seconds are CPU time of that step on one thread.

The second table compares gradients at --short tokens with those of float64: swept and in one graph, in float32 and
under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from longext.attention.chunks import KeyValueStore
from longext.attention.layout import Layout
from longext.attention.shifted import PLAN, AttentionPlan, register_attention
from longext.checkpoint.source import resolve_model
from longext.planning.tracker import MemoryTracker
from longext.training.config import FinetuneConfig
from longext.training.loading import enable_checkpointing, narrow_hidden_states
from longext.training.losses import chunked_loss, shift
from longext.training.sweep import sweep_rows
from longext.training.tuning import make_trainable


def main() -> None:
    """Measure, print two tables, and write sweep.json if a directory is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="../shared/models/books-27m")
    parser.add_argument("--lengths", default="8192,16384,65536")
    parser.add_argument("--short", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--group", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = arguments.model if Path(arguments.model).is_dir() else "books-5m"
    lengths = [int(length) for length in arguments.lengths.split(",")]
    result: dict[str, Any] = {
        "model": Path(name).name, "chunk": arguments.chunk, "group": arguments.group, "seed": 0, "threads": 1,
        "device": "cpu", "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    print(f"{result['model']}'s sizes, groups of {arguments.group:,}, chunks of {arguments.chunk:,}, one CPU thread\n")
    result["exactness"] = exactness(name, arguments)
    print("\n| tokens | | peak MB | halo MB | CPU s | s per 1,000 tokens |\n|--:|:--|--:|--:|--:|--:|")
    result["steps"] = []
    runs = [(lengths[0], None), *((length, arguments.chunk) for length in lengths)]
    for length, chunk in runs:
        step = measure(name, length, chunk, arguments.group)
        result["steps"].append(step)
        how = "one graph" if chunk is None else "swept"
        cells = [f"{length:,}", how, *(f"{step[name] / 1e6:,.1f}" for name in ("peak_bytes", "halo_bytes"))]
        cells += [f"{step['seconds']:,.1f}", f"{1000 * step['seconds'] / length:.3f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (the model to train, the causal LM in it): random weights, adapters that do something already."""
    register_attention()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(resolve_model(name))
    model = AutoModelForCausalLM.from_config(config)
    network, _ = make_trainable(model, FinetuneConfig(model=name, data="sample"), name)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0, 0.02)
    narrow_hidden_states(model)
    enable_checkpointing(model, offload=False)
    model.set_attn_implementation("s2_attn")
    return network.to(dtype).train(), model


def gradient(
    network: Any, base: Any, length: int, chunk: int | None, group: int, autocast: bool = False
) -> KeyValueStore:
    """Take the gradient of one row of random tokens; returns the store of a swept one."""
    ids = torch.randint(3, 8192, (1, length), generator=torch.Generator().manual_seed(0))
    tensors = {"input_ids": ids, "position_ids": torch.arange(length)[None], "shift_labels": shift(ids)}
    plan, store = AttentionPlan(Layout(1, length), group), KeyValueStore()

    def amp() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    with chunked_loss(base, 256):
        if chunk is None:
            with amp():
                loss = network(**tensors, num_items_in_batch=length, use_cache=False, **{PLAN: plan})["loss"]
            loss.backward()
        else:
            sweep_rows(network, tensors, plan, chunk, length, store=store, autocast=amp)
    return store


def measure(name: str, length: int, chunk: int | None, group: int) -> dict[str, Any]:
    """Return seconds and bytes of one step."""
    network, base = build(name)
    started = time.process_time()
    with MemoryTracker([*network.parameters(), *network.buffers()]) as tracker:
        store = gradient(network, base, length, chunk, group)
    seconds = time.process_time() - started
    return {
        "length": length,
        "chunk": chunk,
        "seconds": seconds,
        "peak_bytes": tracker.peak,
        "halo_bytes": store.kept_bytes,
    }


def exactness(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return how far gradients are from those of float64 in one graph, relative to their norm."""
    group, length = arguments.group // 8, arguments.short
    kinds = [(torch.float64, False), (torch.float32, False), (torch.float32, True)]
    found, rows = {}, []
    for dtype, autocast in kinds:
        for chunk in (None, group):
            network, base = build(name, dtype)
            gradient(network, base, length, chunk, group, autocast)
            flat = [p.grad.double().flatten() for p in network.parameters() if p.grad is not None]
            found[dtype, autocast, chunk] = torch.cat(flat)
    exact = found[torch.float64, False, None]
    print(f"Gradients at {length:,} tokens, groups and chunks of {group}\n\n| | one graph | swept |\n|:--|--:|--:|")
    for dtype, autocast in kinds:
        label = "bfloat16 autocast" if autocast else str(dtype).removeprefix("torch.")
        errors = [float((found[dtype, autocast, chunk] - exact).norm() / exact.norm()) for chunk in (None, group)]
        rows.append({"dtype": label, "one_graph": errors[0], "swept": errors[1]})
        print(f"| {label} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)
    return rows


if __name__ == "__main__":
    main()
