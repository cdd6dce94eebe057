"""A text of which a KV policy, or a window of raw tokens, keeps so much and no more: read, continued, put on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longext.compressor.reading.continuing import Continued
from longext.compressor.reading.eviction import QUESTION, HeldLayer, PolicyTrail
from longext.compressor.reading.memory_file import Origin, Stored, damaged, write_memory
from longext.compressor.reading.trails import Stream
from longext.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from longext.compressor.reading.readers import Reader

_PARTS = ("kept", "notes")  # what a policy notes of keys and of layers


class HeldSession(Stream, Continued):
    """A text that is read through a reader's memory.

    Args:
        reader: whose memory is no compressor's.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.eos = reader.ending_tokens
        self.origin: Origin | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        trail, reader = self.reader.open_trail(), self.reader
        super().__init__(trail, reader.segment, partial(reader.read_segment, trail) if reader.is_uncached else None)
        self.num_tokens = 0

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return self.reader.plain.device

    @property
    def num_ids(self) -> int:
        """How many token ids the model knows."""
        return int(self.reader.plain.model.get_input_embeddings().weight.shape[0])

    def expect(self, question: Sequence[int]) -> None:
        """Tell a query-aware policy how the prompt ends."""
        self.trail.ask(torch.tensor([list(question)], device=self.device)[:, -QUESTION:])

    def positions(self) -> tuple[int, int]:
        """Return the positions in use: what is held, and raw tokens; and how many the model has."""
        held = self.trail.start if isinstance(self.trail, PolicyTrail) else _length(self.trail.state)
        return held + _length(self.tail), self.trail.backbone.window

    def facts(self) -> dict[str, Any]:
        """Return slots and bytes that are held behind the current segment, where there are such."""
        names = ("num_slots", "num_bytes")
        return {name: getattr(self.trail, name) for name in names if hasattr(self.trail, name)}

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write what is held to one .safetensors file, from which `restore_from` goes on; `notes` as `write_memory`.

        Raises:
            ConfigError: this memory is none that a file could stand for.
        """
        assert self.origin is not None
        check_holds(self.reader.spec, self.trail)
        assert isinstance(self.trail, PolicyTrail)
        tensors: dict[str, torch.Tensor] = {}
        for layer in self.trail.layers if self.trail.num_read else ():
            tensors |= _tensors_of(layer)
        lists: dict[str, list[int]] = {
            "sink": [],
            "before": [],
            "tail": [] if self.tail is None else self.tail[0].tolist(),
        }
        counts = {"num_segments": self.trail.num_read // self.segment, "num_tokens": self.num_tokens}
        write_memory(Path(path), tensors, lists, {"kind": "policy", **counts}, self.origin, notes)

    def restore_from(self, stored: Stored) -> None:
        """Go on from a file.

        Raises:
            CheckpointError: another memory wrote it, or it is damaged.
        """
        said, trail, reader = stored.description, self.trail, self.reader
        if said["kind"] != "policy" or said["memory"] != reader.spec or said["segment"] != self.segment:
            raise CheckpointError(
                f"{stored.path} was written with --memory {said['memory']} in segments of {said['segment']}, not with "
                f"{reader.spec} in segments of {self.segment}."
            )
        check_holds(reader.spec, trail)
        assert isinstance(trail, PolicyTrail)
        self.reset()
        trail = self.trail
        assert isinstance(trail, PolicyTrail)
        tail = self.checked(stored.tokens["tail"])
        trail.num_read = said["num_segments"] * self.segment
        if said["num_tokens"] != trail.num_read + tail.shape[1] or tail.shape[1] > self.segment:
            raise damaged(stored.path, "its tokens are not as many as it says")
        if trail.num_read:
            _put_back(trail, stored)
        self.tail = tail if tail.shape[1] else None
        self.num_tokens = said["num_tokens"]


def _length(tokens: torch.Tensor | None) -> int:
    return 0 if tokens is None else tokens.shape[1]


def check_holds(spec: str, trail: Any) -> None:
    """Raise ConfigError unless what a trail keeps is worth a file: keys and values, chosen without the question."""
    if not isinstance(trail, PolicyTrail):
        raise ConfigError(f"--memory {spec} keeps no keys or values that a file could hold: keep the text itself.")
    if trail.policy.aware:
        raise ConfigError(f"--memory {spec} chooses by the question, which a file does not know: leave -aware out.")


def _tensors_of(layer: HeldLayer) -> dict[str, torch.Tensor]:
    """Return what a layer holds, by names that end with its number."""
    assert layer.held is not None and layer.origins is not None
    keys, values = map(layer.padded, layer.held)
    found = {"held.keys": keys, "held.values": values, "origins": layer.origins}
    if layer.bias is not None:
        found["held.bias"] = layer.bias
    for part in _PARTS:
        found |= {f"{part}.{name}": tensor for name, tensor in getattr(layer, part).items()}
    return {f"{name}.{layer.number}": tensor for name, tensor in found.items()}


def _put_back(trail: PolicyTrail, stored: Stored) -> None:
    """Give the layers of a trail what a file holds (CheckpointError: it fits no such layer)."""
    device = trail.backbone.device
    named: dict[int, dict[str, torch.Tensor]] = {layer.number: {} for layer in trail.layers}
    for name, tensor in stored.tensors.items():
        what, _, number = name.rpartition(".")
        if not number.isdecimal() or len(number) > 6 or int(number) not in named:
            raise damaged(stored.path, f"'{name}' belongs to no layer of the model")
        named[int(number)][what] = tensor.to(device)
    shapes = _shapes(trail)
    for layer in trail.layers:
        _put_in(layer, named[layer.number], stored.path, trail, shapes[layer.number])
    trail.start = trail.num_slots


def _put_in(
    layer: HeldLayer, found: dict[str, torch.Tensor], path: Path, trail: PolicyTrail, shape: tuple[int, int, int]
) -> None:
    """Give one layer what was found of it; `shape` as `_shapes`."""
    names = ("held.keys", "held.values", "origins")
    if any(name not in found for name in names):
        raise damaged(path, f"layer {layer.number} has no keys, values or origins")
    keys, values, origins = (found.pop(name) for name in names)
    rows, (num_heads, *widths) = tuple(origins.shape), shape
    fits = all(tuple(one.shape) == (*rows, width) for one, width in zip((keys, values), widths, strict=True))
    is_held = rows[:2] == (1, num_heads) and len(rows) == 3 and rows[2] <= num_heads * trail.budget.most
    if not (fits and is_held and all(bool(one.isfinite().all()) for one in (keys, values))):
        raise damaged(path, f"layer {layer.number} holds keys or values that the model does not make")
    if bool(((origins < -1) | (origins >= trail.num_read)).any()):
        raise damaged(path, f"layer {layer.number} holds keys of tokens that were not read")
    bias = found.pop("held.bias", None)
    own = {part: {n.partition(".")[2]: one for n, one in found.items() if n.startswith(f"{part}.")} for part in _PARTS}
    of_keys = [one for one in (bias, *own["kept"].values()) if one is not None]
    is_number = not any(bool(one.isnan().any()) for one in (*of_keys, *own["notes"].values()))
    if any(tuple(one.shape) != rows for one in of_keys) or not is_number:
        raise damaged(path, f"layer {layer.number} has biases or notes of other keys")
    hides = origins >= 0 if bias is None else bias.isneginf() | (origins >= 0)  # no key of zeros is read
    if not bool(hides.all()) or (bias is not None and bool(bias.isposinf().any())):
        raise damaged(path, f"layer {layer.number} has biases that fit no keys")
    dtype = trail.backbone.dtype
    layer.hold(keys.to(dtype), values.to(dtype), origins)
    layer.bias = bias
    layer.kept, layer.notes = own["kept"], own["notes"]


@torch.no_grad()
def _shapes(trail: PolicyTrail) -> dict[int, tuple[int, int, int]]:
    """Return (KV heads, size of a key, size of a value) of each layer, as the model makes them of one token."""
    trail.begin(torch.zeros(1, 1, dtype=torch.int64, device=trail.backbone.device), 0)
    found = {
        layer.number: (layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in trail.layers
    }
    for layer in trail.layers:
        layer.forget_chunk()
    return found
