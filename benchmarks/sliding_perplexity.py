"""Sliding-window perplexity: longext against the straightforward loop, same windows, same numbers.

The loop is what most scripts do: one window at a time, full logits, `labels` with -100 before the new tokens
(transformers' own loss). Each variant runs in a process of its own, so that peak memory is its own.

    python benchmarks/sliding_perplexity.py [--model books-5m] [--window 2048] [--stride 256] [--windows 12] [-o FILE]

Seconds are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path

from records import CLOCK, add_output, now, write_record

VARIANTS = ("loop", "longext sliding", "longext positional")


def peak_reset() -> float:
    """Forget the process's peak memory so far (Linux) and return the current size in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> float:
    """Return VmRSS or VmHWM of this process in bytes; elsewhere than Linux, the peak since its start."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def loop(model, ids, window: int, stride: int) -> tuple[float, int]:
    """Return (total NLL, tokens scored) as the usual script computes them."""
    import torch

    total, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, stride):
        batch = torch.tensor([ids[start : start + window]])
        labels = batch.clone()
        if start:
            labels[:, :-stride] = -100
        with torch.no_grad():
            loss = model(batch, labels=labels).loss
        scored = stride if start else window - 1
        total, count = total + float(loss) * scored, count + scored
    return total, count


def measure(variant: str, args: argparse.Namespace) -> dict:
    """Load the model, run one variant twice (the first warms up) and report the second."""
    from longext.data.documents import load_documents
    from longext.evals.perplexity import TokenizedDocument, evaluate_perplexity, num_forward_tokens
    from longext.evals.suites.ppl import Perplexity
    from longext.models.hf import load_language_model
    from longext.options import RuntimeConfig

    protocol = "positional" if variant.endswith("positional") else "sliding"
    config = Perplexity(
        model=args.model,
        data=args.data,
        protocol=protocol,
        lengths=(args.window,),
        stride=args.stride,
        num_bootstrap=0,
        num_buckets=1,
    )
    model = load_language_model(RuntimeConfig(model=args.model, device="cpu", threads=1))
    ids = model.encode(load_documents(config)[0].text)[: args.window + (args.windows - 1) * args.stride]
    documents = [TokenizedDocument("document", tuple(ids))]

    def run(tokens):
        if variant == "loop":
            return loop(model.model, tokens, args.window, args.stride)
        row = evaluate_perplexity(model, [TokenizedDocument("document", tuple(tokens))], config)[0]
        return row.nll * row.num_tokens, row.num_tokens

    run(ids[: args.window + args.stride])
    before = peak_reset()
    started = now("cpu")
    total, count = run(ids)
    seconds = now("cpu") - started
    forward = num_forward_tokens(documents, config)
    return {
        "nll": total / count,
        "scored": count,
        "forward": forward,
        "seconds": seconds,
        "peak": memory("VmHWM") - before,
    }


def main() -> None:
    """Run every variant and print the table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="books-5m")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest run of each variant counts")
    add_output(parser)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    rows = {}
    for _ in range(args.repeats):
        for variant in VARIANTS:
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--variant", variant],
                capture_output=True,
                text=True,
                check=True,
            )
            row = json.loads(run.stdout.strip().splitlines()[-1])
            rows[variant] = min(rows.get(variant, row), row, key=lambda r: r["seconds"])
    report(rows, args)


def report(rows: dict[str, dict], args: argparse.Namespace) -> None:
    """Print seconds, scored tokens per second, peak memory and the ratios against the loop."""
    import torch
    import transformers

    base = rows["loop"]
    print(f"{args.model}, {args.data}, window {args.window}, stride {args.stride}, float32")
    print(f"one CPU thread, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"{'variant':<20}{'NLL':>12}{'scored':>8}{'seconds':>9}{'scored/s':>10}{'peak MB':>9}{'speed':>8}{'memory':>8}"
    )
    for variant, row in rows.items():
        rate, base_rate = row["scored"] / row["seconds"], base["scored"] / base["seconds"]
        measured = f"{row['nll']:>12.7f}{row['scored']:>8}{row['seconds']:>9.2f}{rate:>10,.0f}{row['peak'] / 1e6:>9.1f}"
        print(f"{variant:<20}{measured}{rate / base_rate:>7.2f}x{row['peak'] / base['peak']:>7.2f}x")
    difference = abs(rows["longext sliding"]["nll"] / base["nll"] - 1)
    about = {name: vars(args)[name] for name in ("window", "stride", "windows", "repeats")}
    about |= {"model": Path(args.model).name, "data": args.data, "clock": CLOCK}
    write_record(args.output, seed=0, **about, rows=rows, difference_of_nll=difference)
    print(f"relative difference of the two sliding NLLs: {difference:.1e} (must be below 1e-5)")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
