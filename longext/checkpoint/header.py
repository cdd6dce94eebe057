"""The header of a safetensors file, read and checked without the data."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext.errors import CheckpointError, LongextError
from longext.untrusted import Kind, decode, fields, is_a, open_file, parse_json, shown

_MAX_HEADER = 100 * 2**20  # safetensors' own limit
# Bits of an element.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATS = frozenset(name for name in _BITS if name.startswith(("F", "BF")))


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: tensors as (dtype, shape, start, end), byte offsets from `data_start`."""

    size: int
    data_start: int
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    metadata: dict[str, str]


def read_header(path: Path, kind: Kind = CheckpointError, advice: str = "Download it again.") -> Header:
    """Read the header of a safetensors file, never its data, and check that the two agree.

    Tensors must fill the data without holes or overlaps, each as many bytes as its shape and dtype take: what
    safetensors itself asks for when it opens the file.

    Raises:
        FileNotFoundError: there is none.
        LongextError: of `kind`; names the tensor.
    """
    with open_file(path, kind) as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(8)
        if len(raw) < 8:
            raise kind(f"{path} is truncated: {size} bytes, no safetensors header. {advice}")
        (length,) = struct.unpack("<Q", raw)
        if length > min(_MAX_HEADER, size - 8):
            raise kind(f"{path} has no readable safetensors header (it claims {length} bytes of {size}). {advice}")
        content = file.read(length)
    broken = f"{path} has a broken safetensors header"
    try:
        header = parse_json(decode(content, "it", _Broken), "it", _Broken, want=dict)
        metadata = _metadata(header.pop("__metadata__", {}))
        tensors = {name: _entry(name, entry) for name, entry in header.items()}
        end = _check_order(tensors)
    except _Broken as error:
        raise kind(f"{broken} ({error}). {advice}") from error
    if 8 + length + end != size:
        trouble = "truncated" if 8 + length + end > size else "longer than it should be"
        raise kind(f"{path} is {trouble}: {size} bytes, its header describes {8 + length + end}. {advice}")
    return Header(size, 8 + length, tensors, metadata)


class _Broken(LongextError):
    """A header that is none; `read_header` adds the file."""


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _Broken("__metadata__ must map text to text")
    return value


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    own = fields(entry, f"tensor '{name}'", {"dtype": str, "shape": list, "data_offsets": list}, _Broken)
    dtype, shape, offsets = own["dtype"], own["shape"], own["data_offsets"]
    if dtype not in _BITS:
        raise _Broken(f"tensor '{name}' has the unknown dtype {shown(dtype)}")
    if not all(is_a(size, int) and 0 <= size < 2**63 for size in shape):
        raise _Broken(f"tensor '{name}' has the shape {str(shape)[:60]}, not whole numbers >= 0")
    if len(offsets) != 2 or not all(is_a(offset, int) and 0 <= offset < 2**63 for offset in offsets):
        raise _Broken(f"tensor '{name}' has the data_offsets {str(offsets)[:60]}, not two whole numbers >= 0")
    elements = 1
    for size in shape:
        elements *= size
    start, end = offsets
    if (end - start) * 8 != elements * _BITS[dtype]:
        takes = -(-elements * _BITS[dtype] // 8)
        raise _Broken(
            f"tensor '{name}' takes {takes} bytes as {dtype} {str(shape)[:60]}, its offsets span {end - start}"
        )
    return dtype, tuple(shape), start, end


def _check_order(tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> int:
    """Return where the data ends, after checking that each tensor starts where the one before it ends."""
    at, before = 0, ""
    for name, (_, _, start, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if start != at:
            what = "overlaps" if start < at else "leaves a hole behind"
            raise _Broken(f"tensor '{name}' {what} {f'tensor {before!r}' if before else 'the start of the data'}")
        at, before = end, name
    return at
