"""Cross-entropy in chunks against full logits: memory and time of forward and backward, in one run.

Full logits are what transformers computes: head(hidden), upcast to float32, cross_entropy. Peak memory is that of a
fresh process above what it held before the loss. Seconds are CPU time on a CPU.

    python benchmarks/chunked_loss.py [--tokens 8192] [--hidden 512] [--vocabulary 32000] [-o FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing

import torch
import torch.nn.functional as F
from records import CLOCK, add_output, now, write_record


def main() -> None:
    """Print one row per way, with ratios against full logits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    add_output(parser)
    arguments = parser.parse_args()
    sizes = (arguments.tokens, arguments.hidden, arguments.vocabulary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{sizes[0]:,} tokens, hidden {sizes[1]:,}, vocabulary {sizes[2]:,}, {device}, torch {torch.__version__}\n")
    print("| head | way | peak GiB | full / this | seconds | full / this | loss |")
    print("|:--|:--|--:|--:|--:|--:|--:|")
    rows = []
    for trained in (False, True):
        full = in_fresh_process(*sizes, None, trained)
        for name, chunk in (("full logits", None), ("chunks of 4,096", 4096), ("chunks of 1,024", 1024)):
            peak, seconds, loss = full if chunk is None else in_fresh_process(*sizes, chunk, trained)
            cells = [f"{peak / 2**30:.2f}", f"{full[0] / peak:.1f}", f"{seconds:.2f}", f"{full[1] / seconds:.2f}"]
            head = "trained" if trained else "frozen"
            print(f"| {head} | {name} | {' | '.join(cells)} | {loss:.5f} |", flush=True)
            rows.append({"head": head, "chunk": chunk, "peak_bytes": peak, "seconds": seconds, "loss": loss})
            sizes_of = {name: vars(arguments)[name] for name in ("tokens", "hidden", "vocabulary")}
            write_record(arguments.output, seed=0, clock=CLOCK, **sizes_of, rows=rows)


def in_fresh_process(*work) -> tuple[int, float, float]:
    """Measure in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, work)


def measure(tokens: int, width: int, vocabulary: int, chunk: int | None, trained: bool) -> tuple[int, float, float]:
    """Return (peak bytes above the start, seconds, loss) of one forward and backward."""
    from longext.training.callbacks import peak_memory
    from longext.training.losses import chunked_cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(trained)
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    before = peak_memory(device)
    started = now(device.type)
    if chunk is None:
        loss = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    else:
        parameters = [p for p in head.parameters() if p.requires_grad]
        loss = chunked_cross_entropy(hidden, labels, head, parameters, chunk)
    (loss / tokens).backward()
    seconds = now(device.type) - started
    return peak_memory(device) - before, seconds, float(loss.detach()) / tokens


if __name__ == "__main__":
    main()
