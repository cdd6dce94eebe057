"""A document's gradient by policy: time and peak memory against the number of segments, in one run.

Columns on the same documents, weights and pieces (UIO's encoder, transfer head and frozen reader):

full         one autograd graph of the whole document: the exact gradient
window:2     UIO-LLMs' incremental TBPTT (arXiv 2406.18173, appendix B) on keys and values: a biased gradient
released:2   the reservoir of UIO's published training code, restated in `released_reservoir` below: biased
exact        our sweep: one segment's graph alive, every segment encoded twice: the exact gradient
exact/1      the same with the first encoding one segment at a time, not L / 2 of them: least memory

    python benchmarks/compressor_gradients.py [--segments 4,8,16,32,64] [--repeats 3] [--device cuda] [-o FILE]

Peak memory is above weights and tokens: on CUDA the allocator's peak, on a CPU that of all live tensors, counted
operator by operator in an untimed run. Seconds on one CPU thread are CPU time, else wall time. A model of the size of
books-5m, random weights, float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from records import add_output, write_record
from transformers import AutoConfig, AutoModelForCausalLM

from longext.checkpoint.source import resolve_model
from longext.compressor.backbone import Backbone
from longext.compressor.base import build_compressor
from longext.compressor.gradients import Sweep, backprop
from longext.compressor.memory import join, num_slots
from longext.compressor.policies import parse_policy
from longext.compressor.segments import split_segments
from longext.compressor.spec import CompressorSpec
from longext.planning.tracker import MemoryTracker

POLICIES = ("full", "window:2", "released:2", "exact", "exact/1")


def main() -> None:
    """Print one row per number of segments, then the ratios that matter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", default="4,8,16,32")
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--ratio", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output(parser)
    arguments = parser.parse_args()
    compressor = make_compressor(arguments)
    counts = [int(count) for count in arguments.segments.split(",")]
    print(
        f"books-5m's sizes, {arguments.segment}-token segments at {arguments.ratio}x, {arguments.device}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}; best of {arguments.repeats} interleaved\n"
    )
    print(f"| segments | {' | '.join(f'{p} s' for p in POLICIES)} | exact / window:2 | exact / full | "
          f"{' | '.join(f'{p} MB' for p in POLICIES)} |")  # fmt: skip
    print(f"|{'--:|' * (3 + 2 * len(POLICIES))}")
    measured = {}
    for count in counts:
        measured[count] = row = measure(make_document(compressor, count, arguments), arguments.repeats)
        seconds, peaks = ([row[policy][i] for policy in POLICIES] for i in (0, 1))
        cells = [f"{count}", *(f"{value:.3f}" for value in seconds)]
        cells += [f"{row['exact'][0] / row[other][0]:.2f}" for other in ("window:2", "full")]
        cells += [f"{peak / 1e6:.1f}" for peak in peaks]
        print(f"| {' | '.join(cells)} |", flush=True)
        write_record(arguments.output, seed=0, **record_of(compressor, measured, arguments))
    summarise(compressor, measured, arguments)


def record_of(compressor, measured, arguments) -> dict:
    """Return the numbers as JSON takes them."""
    names = ("seconds", "peak_bytes", "backwards_of_zeros")
    runs = [
        {"segments": count, "gradient": policy, **dict(zip(names, found, strict=True))}
        for count, row in measured.items()
        for policy, found in row.items()
    ]
    sizes = {name: getattr(arguments, name) for name in ("segment", "ratio", "repeats")}
    return {**sizes, "bytes_of_a_memory": memory_numbers(compressor, arguments) * 4, "runs": runs}


def memory_numbers(compressor, arguments) -> int:
    """Return how many numbers the keys and values of one segment's memory are."""
    config = compressor.backbone.config
    slots = arguments.segment // arguments.ratio
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * slots


def make_compressor(arguments):
    """Return a UIO compressor on a random model of books-5m's sizes; its adapters do something already."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(resolve_model("books-5m"))
    backbone = Backbone(AutoModelForCausalLM.from_config(config).float().to(arguments.device))
    spec = CompressorSpec(segment=arguments.segment, ratios=(arguments.ratio,), sink=0, rank=16, alpha=64.0)
    compressor = build_compressor(backbone, spec).to(arguments.device)
    for parameter in compressor.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return compressor


def make_document(compressor, count: int, arguments) -> Sweep:
    """Return a document of `count` segments of random tokens; positions beyond the model's window do for a timing."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(3, 8192, (1, count * arguments.segment), generator=generator).to(arguments.device)
    return Sweep(split_segments(ids, ids, compressor.spec, [arguments.ratio] * count), compressor, 1 / ids.numel())


# --- the reservoir of the published code ------------------------------------------------------------------------------


def released_reservoir(document: Sweep, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
    """Add the gradient that UIO-LLMs' published training loop gives; return (sum of losses, backwards of zeros).

    What its `train.py` does, and our `reservoir:S` does not (arXiv 2406.18173 describes neither point 2 nor 4):

    1. A memory is the hidden states that every layer's attention sees at the probes, as a view into those of the
       whole segment: text rows stay in memory with it.
    2. Leaves are these hidden states, so every reader projects all memories so far again, evicted ones too. The
       transfer head's gradient is thereby exact, and only the encoder's is sampled.
    3. Every segment is encoded with a graph. One that the reservoir does not take is pulled back all the same, with a
       gradient of zeros.
    4. No compensation factor.
    5. `retain_graph` keeps a reader's graph alive until the next reader has run: two at the peak.

    Without the published code's float32 logits of encoder rows, dense position tables and three copies of the model.
    """
    compressor, start = document.compressor, num_slots(document.new_store().fixed)
    fixed = document.new_store().fixed
    hidden, leaves, held = {}, [], []
    total, kept, zeros = document.zero, None, 0
    for t, segment in enumerate(document.segments):
        if t:
            memory = join([fixed, project_all(compressor, leaves, start)])
            loss = compressor.loss(compressor.read(segment, memory), segment)
            (loss * document.scale).backward(retain_graph=True)
            kept, total = loss, total + loss.detach()  # `kept` lets go of the reader before only now
            del memory, loss
        if t == len(document.segments) - 1:
            break
        hidden[t] = encode(compressor, segment)
        leaves.append([states.detach().requires_grad_() for states in hidden[t]])
        evicted = offer(held, t, size, rng)
        if evicted is not None:
            zeros += pull_back(hidden.pop(evicted), leaves[evicted])
            leaves[evicted] = [leaf.detach() for leaf in leaves[evicted]]
    del kept
    for s in held:
        zeros += pull_back(hidden.pop(s), leaves[s])
    return total, zeros


def encode(compressor, segment) -> list[torch.Tensor]:
    """Return each layer's hidden states at the probes [B, k, D], with a graph; views of those of all rows."""
    embeds, positions, mask = compressor._inputs(segment.tokens, segment.ratio)
    with compressor.adapters.use("encoder"):
        rows = slice(segment.tokens.shape[1], None)
        return compressor.backbone.attention_inputs(embeds, rows, positions, mask).hidden


def project_all(compressor, leaves: list[list[torch.Tensor]], start: int) -> tuple[torch.Tensor, ...]:
    """Return keys (rotated to their slots) and values of all memories so far, by the transfer head (Llama only)."""
    backbone, made = compressor.backbone, []
    with compressor.adapters.use("transfer"):
        for layer, attention in enumerate(backbone.attentions):
            states = torch.cat([leaf[layer] for leaf in leaves], 1)
            batch, count = states.shape[:2]
            keys, values = (
                linear(states).view(batch, count, -1, attention.head_dim).transpose(1, 2)
                for linear in (attention.k_proj, attention.v_proj)
            )
            slots = torch.arange(start, start + count, device=states.device)[None]
            cos, sin = (part[:, None] for part in backbone.rotation(states, slots, layer))
            first, second = keys.chunk(2, -1)
            made += [keys * cos + torch.cat([-second, first], -1) * sin, values]
    return tuple(made)


def offer(held: list[int], segment: int, size: int, rng: np.random.Generator) -> int | None:
    """Put a segment into the reservoir by Vitter's algorithm R; return which one goes, itself perhaps."""
    if len(held) < size:
        held.append(segment)
        return None
    place = int(rng.integers(0, segment + 1))
    if place >= size:
        return segment
    evicted, held[place] = held[place], segment
    return evicted


def pull_back(hidden: list[torch.Tensor], leaves: list[torch.Tensor]) -> bool:
    """Take the gradient gathered by the leaves back through the encoder; True where it was all zeros.

    The first layer's input at the probes is the memory vector itself after its norm, so it has a graph as well.
    """
    gathered = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    torch.autograd.backward(hidden, gathered)
    return all(leaf.grad is None for leaf in leaves)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(document: Sweep, repeats: int) -> dict[str, tuple[float, int, int]]:
    """Return policy -> (best seconds, peak bytes, encoder backwards of zeros)."""
    runs = {policy: runner(document, policy) for policy in POLICIES}
    peaks = {policy: peak_of(document, run) for policy, run in runs.items()}
    best = dict.fromkeys(POLICIES, float("inf"))
    zeros = dict.fromkeys(POLICIES, 0)
    for _ in range(repeats):
        for policy, run in runs.items():
            document.compressor.zero_grad()
            started = now(document)
            zeros[policy] = run()
            best[policy] = min(best[policy], now(document) - started)
    return {policy: (best[policy], peaks[policy], zeros[policy]) for policy in POLICIES}


def runner(document: Sweep, policy: str) -> Callable[[], int]:
    """Return what takes the gradient once, with the same draws every time, and counts backwards of zeros."""
    name, _, size = policy.partition(":")
    if name == "released":
        return lambda: released_reservoir(document, int(size), np.random.default_rng(0))[1]
    policy, _, at_once = policy.partition("/")
    parsed = parse_policy(policy)

    def run() -> int:
        document.at_once = int(at_once) if at_once else None
        backprop(document, parsed, np.random.default_rng(0))
        return 0

    return run


def peak_of(document: Sweep, run: Callable[[], int]) -> int:
    """Return the most bytes above weights and tokens while the gradient is taken (gradients of weights included)."""
    compressor = document.compressor
    compressor.zero_grad()
    device = compressor.backbone.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with MemoryTracker([*compressor.backbone.model.parameters(), *compressor.parameters()]) as tracker:
        run()
    return tracker.peak


def now(document: Sweep) -> float:
    """Return the time once the device is done; CPU time where one thread does all the work."""
    if document.compressor.backbone.device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()  # other processes on the machine do not count
    return time.perf_counter()


def summarise(compressor, measured: dict[int, dict[str, tuple[float, int, int]]], arguments) -> None:
    """Print what a further segment costs each policy, beside the bytes of one segment's memory and its gradients."""
    counts = sorted(measured)
    first, last = counts[0 if len(counts) < 2 else -2], counts[-1]
    slots = arguments.segment // arguments.ratio
    numbers = memory_numbers(compressor, arguments)
    needed = numbers * compressor.backbone.dtype.itemsize + numbers * 4
    print(f"\nOne segment's memory ({slots} slots) and its float32 gradients: {needed / 1e6:.3f} MB.")
    if first == last:
        return
    print(f"\n| from {first} to {last} segments | {' | '.join(POLICIES)} |")
    print(f"|:--{'|--:' * len(POLICIES)}|")
    growth = {p: (measured[last][p][1] - measured[first][p][1]) / (last - first) for p in POLICIES}
    print(f"| peak, MB per further segment | {' | '.join(f'{growth[p] / 1e6:.3f}' for p in POLICIES)} |")
    print(f"| of memory + gradients | {' | '.join(f'{growth[p] / needed:.1f}x' for p in POLICIES)} |")
    pace = {p: (measured[last][p][0] - measured[first][p][0]) / (last - first) for p in POLICIES}
    print(f"| ms per further segment | {' | '.join(f'{1000 * pace[p]:.1f}' for p in POLICIES)} |")
    wasted = [f"{row['released:2'][2]} of {count - 1}" for count, row in sorted(measured.items())]
    print(f"\nEncoder backwards of zeros in released:2, by segments: {', '.join(wasted)}.")


if __name__ == "__main__":
    main()
