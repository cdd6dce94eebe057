"""A session on disk: one safetensors file with its memory, its raw tokens, and which compressor can read it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint.weights import StoredTensor, is_float, read_header
from longext.compressor.base import Compressor
from longext.compressor.checkpoint import BaseModel
from longext.compressor.memory import Memory
from longext.errors import CheckpointError
from longext.staging import staged_file
from longext.untrusted import fields, parse_json

SCHEMA = "longext.memory/3"
KINDS = ("compressor", "policy")
TOKENS = ("sink", "before", "tail")  # lists of token ids that a session needs as text
_KEY = "longext"
_MOST_SEGMENTS = 2**18
_MOST_TOKENS = 2**40
_ADVICE = (
    "It is damaged, or not a memory that longext wrote (`longext memory build`, `longext generate --save-memory`)."
)
_FIELDS = {
    **{"schema": str, "kind": str, "memory": str, "model": str, "revision": (str, None), "base_weights": str},
    **{"segment": int, "method": (str, None), "factor": (float, None), "turn": str, "documents": list},
    **{"num_segments": int, "num_tokens": int},
}
_COMPRESSED = {"spec": dict, "ratios": list, "compressor": str, "when_full": str, "first": int, "held": list}


@dataclass(frozen=True)
class Origin:
    """What wrote a memory, and on which model.

    Attributes:
        memory: as `--memory` spells it; a compressor's directory is absolute.
        model, revision: the frozen model, as the user named it.
        weights: what tells its weights and RoPE from others (`BaseModel.weights`).
        segment: tokens of a segment.
        method, factor: applied to the model in memory.
    """

    memory: str
    model: str
    revision: str | None
    weights: str
    segment: int
    method: str | None = None
    factor: float | None = None


@dataclass(frozen=True)
class Stored:
    """A memory file.

    Attributes:
        tensors: by name; `read_stored` leaves them out.
        tokens: lists of token ids by name.
        description: what the file says of itself, checked.
        num_bytes: of the tensors.
        num_slots: keys of a head that are held, the most of any layer; for soft memories vectors.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    tokens: dict[str, list[int]]
    description: dict[str, Any]
    num_bytes: int
    num_slots: int

    @property
    def origin(self) -> Origin:
        """What wrote it."""
        said = self.description
        names = [field.name for field in dataclasses.fields(Origin)]
        return Origin(**{name: said["base_weights" if name == "weights" else name] for name in names})


def write_memory(
    path: Path,
    tensors: dict[str, torch.Tensor],
    tokens: dict[str, list[int]],
    description: dict[str, Any],
    origin: Origin,
    notes: Mapping[str, Any],
) -> None:
    """Write a memory file, complete or not at all.

    Args:
        tokens: lists of token ids by name.
        description: plain JSON values for the file's metadata.
        notes: of them, what only people and conversations want to know: `documents` (name and tokens of each) and
            `turn`, whose message is open at the end ("user", or "").
    """
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stored |= {name: torch.tensor(ids, dtype=torch.int64) for name, ids in tokens.items()}
    facts = dataclasses.asdict(origin)
    facts["base_weights"] = facts.pop("weights")
    said = {"schema": SCHEMA, "documents": [], "turn": "", **facts, **description, **notes}
    with staged_file(path) as unfinished:
        save_file(stored, unfinished, {_KEY: json.dumps(said)})
        unfinished.chmod(0o644)  # some versions of safetensors make it private


def describe_memory(path: Path) -> Stored:
    """Return what a memory file says of itself, without its tensors and tokens; only its header is read.

    Raises:
        CheckpointError: no such file, or not a memory of this schema.
    """
    return _read(path)[0]


def read_memory(path: Path) -> Stored:
    """Return what `write_memory` wrote (CheckpointError as `describe_memory`)."""
    from safetensors import safe_open

    stored, names = _read(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in names}
    tokens = {name: tensors.pop(name).tolist() for name in TOKENS}
    return dataclasses.replace(stored, tensors=tensors, tokens=tokens)


def _read(path: Path) -> tuple[Stored, list[str]]:
    """Return (what a file says, the names of its tensors)."""
    try:
        header = read_header(path, advice=_ADVICE)
    except FileNotFoundError as error:
        raise CheckpointError(f"No memory file {path}.") from error
    if _KEY not in header.metadata:
        raise CheckpointError(f"{path} has no description of longext. {_ADVICE}")
    where = f"{path}: {_KEY}"
    description = parse_json(header.metadata[_KEY], where, CheckpointError, want=dict, advice=_ADVICE)
    if description.get("schema") != SCHEMA:
        raise CheckpointError(f"{where} does not say {SCHEMA}. {_ADVICE}")
    values = fields(description, where, _FIELDS, CheckpointError, _ADVICE)
    counts = 0 <= values["num_segments"] <= _MOST_SEGMENTS and 0 <= values["num_tokens"] <= _MOST_TOKENS
    if values["kind"] not in KINDS or not counts or not 0 < values["segment"] <= _MOST_TOKENS:
        raise CheckpointError(f"{where} names a kind of memory that is none, or counts that none has. {_ADVICE}")
    values["documents"] = [
        fields(each, f"{where}: documents", {"name": str, "num_tokens": int}, CheckpointError, _ADVICE)
        for each in values["documents"]
    ]
    if values["kind"] == "compressor":
        values |= fields(description, where, _COMPRESSED, CheckpointError, _ADVICE)
        numbers = [*values["ratios"], *values["held"]]
        if not values["ratios"] or not all(type(number) is int and number > 0 for number in numbers):
            raise CheckpointError(f"{where} must name ratios as whole numbers above 0. {_ADVICE}")
    num_bytes, num_slots = _checked_tensors(path, header.tensors)
    return Stored(path, {}, {}, values, num_bytes, num_slots), list(header.tensors)


def _checked_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """Return (bytes, slots) of the tensors that are no tokens (CheckpointError: one is of a kind that none has)."""
    for name in TOKENS:
        found = tensors.get(name)
        if found is None or found.dtype != "I64" or len(found.shape) != 1:
            raise CheckpointError(
                f"{path}: '{name}' must be I64 in one row, found {found.dtype if found else 'nothing'}. {_ADVICE}"
            )
    own = {name: tensor for name, tensor in tensors.items() if name not in TOKENS}
    for name, tensor in own.items():
        wanted = "I32" if name.startswith("origins.") else "floating-point numbers"
        if not (tensor.dtype == "I32" if wanted == "I32" else is_float(tensor.dtype)):
            raise CheckpointError(f"{path}: '{name}' must be {wanted}, found {tensor.dtype}. {_ADVICE}")
    held = [tensor.shape[-2] for name, tensor in own.items() if _is_held(name) and len(tensor.shape) > 1]
    return sum(tensor.end - tensor.start for tensor in own.values()), max(held, default=0)


def _is_held(name: str) -> bool:
    return name.startswith(("memory.", "held.keys."))


def check_model(path: Path, base: BaseModel, recorded: str) -> None:
    """Refuse a memory of another model: CheckpointError unless `base` has the weights and RoPE that were recorded."""
    if not base.is_that_of(recorded):
        raise CheckpointError(f"{path} was written on another base model than {base.name}; it cannot be read.")


def check_held(path: Path, held: tuple[int, ...], first: int, num_segments: int, segment: int) -> None:
    """Refuse ratios of held memories that no session has: CheckpointError unless each divides a segment."""
    if first < 0 or first + len(held) != num_segments or any(r < 1 or segment % r for r in held):
        raise CheckpointError(f"{path}: {_KEY} names memories of ratios that cannot be. {_ADVICE}")


def memory_of(stored: Stored) -> Memory:
    """Return the tensors of a compressor's memory in their order (CheckpointError: one is missing)."""
    count = len(stored.tensors)
    if set(stored.tensors) != {f"memory.{i}" for i in range(count)}:
        raise CheckpointError(f"{stored.path} holds tensors that no compressor's memory has. {_ADVICE}")
    return tuple(stored.tensors[f"memory.{i}"] for i in range(count))


def damaged(path: Path, what: str) -> CheckpointError:
    """Return the error for a file in which `what` is wrong."""
    return CheckpointError(f"{path}: {what}. {_ADVICE}")


def check_memory(path: Path, memory: Memory, compressor: Compressor, num_slots: int) -> None:
    """Refuse a memory that `compressor` cannot have written: of other shapes or sizes, or not finite.

    Args:
        num_slots: that so many compressed segments take, with the sink.

    Raises:
        CheckpointError: names the tensor.
    """
    backbone = compressor.backbone
    number = 1 if compressor.is_soft else 2 * len(backbone.layers)
    if len(memory) != (number if num_slots else 0):
        raise CheckpointError(
            f"{path} holds {len(memory)} memory tensors, and its compressed segments take {number if num_slots else 0}."
            f" {_ADVICE}"
        )
    for i, (tensor, like) in enumerate(zip(memory, _slot(compressor) if memory else (), strict=True)):
        if tensor.shape != (*like.shape[:-2], num_slots, like.shape[-1]):
            raise CheckpointError(f"{path}: 'memory.{i}' has the shape {list(tensor.shape)}, not a memory's. {_ADVICE}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: 'memory.{i}' has NaN or infinite values. {_ADVICE}")


@torch.no_grad()
def _slot(compressor: Compressor) -> Memory:
    """Return a memory of one slot, for its shapes: what the model makes of one token."""
    backbone = compressor.backbone
    token = torch.zeros(1, 1, dtype=torch.int64, device=backbone.device)
    embedded = backbone.embed(token)
    if compressor.is_soft:
        return (embedded,)
    return backbone.project(backbone.attention_inputs(embedded, slice(None)), token)


def hash_weights(compressor: Compressor) -> str:
    """Return a hash of a compressor's own weights, as float32: the precision they are saved in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(compressor.state_dict().items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
