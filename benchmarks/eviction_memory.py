"""What a KV policy holds while it reads a long text in chunks, against its budget: bytes, counted tensor by tensor.

    python benchmarks/eviction_memory.py [MODEL] [--slots 256] [--lengths 8192,32768,100000] [-o FILE]
    python benchmarks/eviction_memory.py [MODEL] --method yarn --factor 8 --slots 3072 --lengths 8192

The budget is the keys and values of the slots and of one chunk, in every layer. Three peaks stand against it:

held   what the layers keep: keys and values, biases, numbers of tokens, a policy's notes, and the chunk where it waits;
       counted at every layer of every chunk.
read   the same, and the copy that one layer is read from: its keys turned to their positions, its values, the chunk's.
       That is a layer more: 1 / layers of the budget.
live   all tensors that operators make above the weights, the network's own states too; counted operator by operator in
       the last chunks before each length.

Random tokens, one text. `window` holds raw tokens alone and reads them again with every chunk, without a cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from records import add_output, write_record
from torch.utils._pytree import tree_map_only

from longext.compressor.reading.eviction import PolicyTrail
from longext.compressor.reading.readers import Reader, load_reader
from longext.evals.memory.efficiency import bytes_per_position
from longext.options import RuntimeConfig
from longext.planning.tracker import MemoryTracker

POLICIES = "snapkv:N,h2o:N,tova:N,keydiff:N,ada-snapkv:N,streaming:4+M,window:N"
TRACKED = 4  # chunks before each length in which all live tensors are counted


def main() -> None:
    """Print a row for each policy and length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="books-5m")
    parser.add_argument("--method")
    parser.add_argument("--factor", type=float)
    parser.add_argument("--memory", default=POLICIES, help="N stands for the slots, M for four fewer")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--segment", type=int, default=128, help="tokens of a chunk")
    parser.add_argument("--lengths", default="8192,32768,100000")
    add_output(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| memory | tokens | budget MB | held | read | live |\n|:--|--:|--:|--:|--:|--:|")
    about = {name: vars(arguments)[name] for name in ("method", "factor", "slots", "segment")}
    rows: list[dict[str, Any]] = []
    for name in arguments.memory.split(","):
        spec = name.replace("N", str(arguments.slots)).replace("M", str(arguments.slots - 4))
        config = RuntimeConfig(model=arguments.model, device="cpu", dtype="float32")
        reader = load_reader(config, spec, segment=arguments.segment, method=arguments.method, factor=arguments.factor)
        for row in measure(reader, arguments.slots, [int(length) for length in arguments.lengths.split(",")]):
            rows.append(row)
            cells = [f"{row[peak] / row['budget_bytes']:.3f}x" for peak in ("held", "read", "live")]
            print(
                f"| `{spec}` | {row['tokens']:,} | {row['budget_bytes'] / 1e6:.2f} | {' | '.join(cells)} |", flush=True
            )
            layers = reader.open_trail().backbone.config.num_hidden_layers
            write_record(arguments.output, seed=0, model=Path(arguments.model).name, layers=layers, **about, rows=rows)


@torch.no_grad()
def measure(reader: Reader, slots: int, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Read one text as far as the longest length; yield the peaks so far at each."""
    trail = reader.open_trail()
    backbone, segment = trail.backbone, reader.segment
    budget = bytes_per_position(backbone) * (slots + segment)
    tokens = torch.randint(
        3, backbone.embedding.num_embeddings, (1, max(lengths)), generator=torch.Generator().manual_seed(0)
    )
    held = Held(trail) if isinstance(trail, PolicyTrail) else None
    live, chunks = 0, tokens.split(segment, 1)
    marks = {-(-length // segment): length for length in lengths}
    for number, chunk in enumerate(chunks, 1):
        if any(0 <= mark - number < TRACKED for mark in marks):
            with MemoryTracker([*backbone.model.parameters(), *backbone.model.buffers(), chunk]) as tracker:
                make_again(trail)
                trail.advance(chunk)
            live = max(live, tracker.peak)
        else:
            trail.advance(chunk)
        if number in marks:
            peaks = (held.held, held.read) if held else (sum(storages_of(tensors_of(trail)).values()),) * 2
            row = {"memory": reader.spec, "tokens": marks[number], "budget_bytes": budget}
            yield row | dict(zip(("held", "read"), peaks, strict=True)) | {"live": live}


class Held:
    """Counts what the layers of a trail keep, whenever one of them has attended and is about to be evicted."""

    def __init__(self, trail: PolicyTrail) -> None:
        self.held = self.read = 0
        for layer in trail.layers:
            layer.evict = self._counting(trail, layer.evict)  # type: ignore[method-assign]

    def _counting(self, trail: PolicyTrail, evict: Any) -> Any:
        def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
            storages = storages_of(tensors_of(trail))
            self.held = max(self.held, sum(storages.values()))
            self.read = max(self.read, sum((storages | storages_of([key, value])).values()))
            evict(query, key, value, *rest)

        return counted


def make_again(trail: Any) -> None:
    """Copy what a trail holds, so that a tracker that has just begun counts it."""
    if not isinstance(trail, PolicyTrail):
        trail.state = None if trail.state is None else trail.state.clone()
        return
    start, num_read, question, layers = trail.state
    trail.state = start, num_read, question, tree_map_only(torch.Tensor, torch.clone, layers)


def tensors_of(trail: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor that a trail holds."""
    if not isinstance(trail, PolicyTrail):
        yield from () if trail.state is None else (trail.state,)
        return
    for layer in trail.layers:
        yield from (*(layer.held or ()), *layer._buffers, *layer.kept.values(), *layer.notes.values())
        yield from (tensor for tensor in (layer.bias, layer.origins) if tensor is not None)


def storages_of(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of the storages behind tensors by their address: those of a view are those it keeps alive."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


if __name__ == "__main__":
    main()
