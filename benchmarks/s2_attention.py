"""Training step with S2-Attn against full attention: time, memory, and the ratio that the FLOPs allow, in one run.

Both columns run the same engine pieces (gradient checkpointing, LoRA + embeddings + norms, chunked loss, AdamW) on the
same tokens; the attention variant is the only difference. The "allowed" ratio is that of the training FLOPs as
torch's own counter and our closed form (longext/planning/flops.py) give them.

    python benchmarks/s2_attention.py [MODEL] [--lengths 2048,8192,16384,32768] [-o FILE]

Seconds are CPU time on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import torch
from records import CLOCK, add_output, now, write_record

from longext.checkpoint.source import resolve_model
from longext.planning.flops import training_flops
from longext.planning.setup import TrainingSetup
from longext.planning.shape import read_shape
from longext.training.config import FinetuneConfig


def main() -> None:
    """Print one row per length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="books-5m")
    parser.add_argument("--lengths", default="2048,8192,16384,32768")
    parser.add_argument("--steps", type=int, default=1)
    add_output(parser)
    arguments = parser.parse_args()
    print(
        f"{arguments.model}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, groups of a quarter row\n"
    )
    print("| tokens | full s | S2 s | full/S2 | FLOPs allow | of allowed | full GiB | S2 GiB |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        measured = {kind: in_fresh_process(arguments.model, length, kind, arguments.steps) for kind in ("full", "s2")}
        ratio = measured["full"][0] / measured["s2"][0]
        allowed = flops(arguments.model, length, "full") / flops(arguments.model, length, "s2")
        cells = [f"{length:,}", *(f"{measured[kind][0]:.2f}" for kind in ("full", "s2")), f"{ratio:.2f}"]
        cells += [f"{allowed:.2f}", f"{ratio / allowed:.0%}"]
        cells += [f"{measured[kind][1] / 2**30:.2f}" for kind in ("full", "s2")]
        print(f"| {' | '.join(cells)} |", flush=True)
        found = {
            f"{kind}_{name}": value
            for kind, both in measured.items()
            for name, value in zip(("seconds", "peak_bytes"), both, strict=True)
        }
        rows.append({"tokens": length, **found, "ratio": ratio, "ratio_of_flops": allowed})
        about = {"model": Path(arguments.model).name, "steps": arguments.steps, "clock": CLOCK}
        write_record(arguments.output, seed=0, **about, rows=rows)


def in_fresh_process(*work) -> tuple[float, int]:
    """Measure in a process of its own: peak resident memory never goes down within one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, work)


def measure(model: str, length: int, attention: str, steps: int) -> tuple[float, int]:
    """Return (median seconds of a step, peak memory in bytes)."""
    from longext.attention.layout import Layout
    from longext.attention.shifted import PLAN, AttentionPlan
    from longext.training.callbacks import peak_memory
    from longext.training.loading import (
        enable_checkpointing,
        load_for_training,
        narrow_hidden_states,
        plan_training_rope,
        training_device,
        uses_autocast,
    )
    from longext.training.losses import chunked_loss, shift
    from longext.training.tuning import make_trainable

    config = FinetuneConfig(model=model, method="linear", target_length=length, attention=attention)
    extension = plan_training_rope(config)
    base, _ = load_for_training(config, extension)
    adapted, _ = make_trainable(base, config, model)
    base = adapted.get_base_model()
    narrow_hidden_states(base)
    enable_checkpointing(base, offload=False)
    device = training_device(config)
    adapted.to(device).train()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5)
    times = []
    for tokens in (min(512, length), *[length] * steps):  # a short first step warms up
        torch.manual_seed(0)
        ids = torch.randint(3, base.config.vocab_size, (1, tokens), device=device)
        plan = AttentionPlan(Layout(1, tokens), max(2, tokens // 4))
        started = now(device.type)
        with chunked_loss(base, 4096), torch.autocast(device.type, torch.bfloat16, uses_autocast(config, device)):
            loss = adapted(input_ids=ids, shift_labels=shift(ids), use_cache=False, **{PLAN: plan}).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        times.append(now(device.type) - started)
    return sorted(times[1:])[steps // 2], peak_memory(device)


def flops(model: str, length: int, attention: str) -> float:
    """Return the closed-form FLOPs of a training step, attention counted as it runs (causal)."""
    setup = TrainingSetup(length=length, attention=attention, compute_bytes=4)
    return training_flops(read_shape(resolve_model(model)), setup, causal=True).total.total


if __name__ == "__main__":
    main()
