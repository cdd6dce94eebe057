"""GGUF files: the header read without the data; keys and tensors added, while everything else is copied byte by byte.

The format is ggml's (docs/gguf.md of ggml-org/ggml), version 2 or 3, little-endian. It is read here and not with the
package `gguf`, whose reader takes seconds for the 98,000 strings of a usual tokenizer. tests hold the two together.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from longext.errors import CheckpointError
from longext.untrusted import open_file

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9  # ggml's numbers of value types
F32 = 0  # ggml's number of a tensor type
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", FLOAT32: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# tensor type -> (values of a block, bytes of a block)
BLOCKS = {
    **{F32: (1, 4), 1: (1, 2), 30: (1, 2), 28: (1, 8), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8)},
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 20: (32, 18), 39: (32, 17)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 21: (256, 110), 22: (256, 82), 23: (256, 136)},
    **{29: (256, 56), 34: (256, 54), 35: (256, 66), 40: (64, 36), 41: (128, 18)},
}
_ALIGNMENT = 32
_CHUNK = 16 * 2**20
_MOST_DIMENSIONS = 4


class GgufTensor(NamedTuple):
    """One tensor: ggml's number of its type, its shape (fastest dimension last), where it is in the file."""

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


class _Entry(NamedTuple):
    """One key: the span of key and value, where the value begins, its type."""

    start: int
    value: int
    end: int
    kind: int


Value = tuple[int, Any]  # ggml's number of a value type, and the value (an array: the type of its items, the items)


@dataclass(frozen=True)
class GgufFile:
    """The header of one file.

    Attributes:
        values: of keys that hold a number or a text; arrays are read by `array`.
        tensors: by name, in their order.
        infos: span of the descriptions of the tensors.
        data_start, data_end: where the data begins, and where that of the last tensor ends.
    """

    path: Path
    version: int
    alignment: int
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]
    entries: dict[str, _Entry]
    infos: tuple[int, int]
    data_start: int
    data_end: int

    @property
    def architecture(self) -> str:
        """Return what llama.cpp calls the architecture, "llama"."""
        return str(self.values.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ARCHITECTURE.`key`, else `default`."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def array(self, key: str) -> list[Any]:
        """Return the items of an array, an empty list if there is none of that name."""
        entry = self.entries.get(key)
        if entry is None or entry.kind != ARRAY:
            return []
        with _mapped(self.path) as content:
            return _Reader(content, self.path, entry.value).array()

    def blocks(self, tensor: GgufTensor) -> Iterator[bytes]:
        """Yield the bytes of a tensor as they are, in pieces."""
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            yield from _pieces(file, tensor.size)

    def sha256(self, tensor: GgufTensor) -> str:
        """Return the SHA-256 of a tensor's bytes."""
        digest = hashlib.sha256()
        for block in self.blocks(tensor):
            digest.update(block)
        return digest.hexdigest()

    def floats(self, name: str) -> np.ndarray[Any, Any]:
        """Return a float32 tensor (CheckpointError: it is stored in another type)."""
        import numpy as np

        tensor = self.tensors[name]
        if tensor.kind != F32:
            raise CheckpointError(f"{self.path}: '{name}' is not stored in float32. Convert the model again.")
        return np.frombuffer(b"".join(self.blocks(tensor)), np.float32).reshape(tensor.shape)


def is_gguf(model: str | Path) -> bool:
    """Return True for a path that ends in .gguf and is no directory."""
    return str(model).lower().endswith(".gguf") and not Path(model).is_dir()


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file and check that the data it describes is there.

    Raises:
        CheckpointError: no such file, another format, big-endian, one part of several, or cut short.
    """
    try:
        with open_file(path, CheckpointError) as file:
            start = file.read(8)
    except FileNotFoundError as error:
        raise CheckpointError(f"No file {path}. Give a .gguf file, or the directory of a checkpoint.") from error
    version = int.from_bytes(start[4:8], "little")
    if start[:4] != MAGIC or len(start) < 8:
        raise CheckpointError(f"{path} is no GGUF file (it does not begin with 'GGUF'). Download it again.")
    if version not in (2, 3):
        kind = "big-endian" if not version & 0xFFFF else f"version {version}"
        raise CheckpointError(f"{path} is a {kind} GGUF file; longext reads versions 2 and 3, little-endian.")
    with _mapped(path) as content:
        found = _read_header(content, path, version)
    if (parts := found.values.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{path} is one part of {parts!r:.40}. Join them first: llama-gguf-split --merge FIRST OUT"
        )
    return found


def _read_header(content: mmap.mmap, path: Path, version: int) -> GgufFile:
    reader = _Reader(content, path, 8)
    num_tensors, num_keys = reader.number("Q"), reader.number("Q")
    values, entries = {}, {}
    for _ in range(num_keys):
        start = reader.place
        key, kind = reader.text(), reader.number("I")
        value = reader.place
        if kind == ARRAY:
            reader.skip_array()
        else:
            values[key] = reader.value(kind)
        if key in entries:
            raise CheckpointError(f"{path} holds the key '{key}' twice. Download it again.")
        entries[key] = _Entry(start, value, reader.place, kind)
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment}, not a power of two. Download it again.")
    start = reader.place
    infos = [reader.info() for _ in range(num_tensors)]
    data_start = _padded(reader.place, alignment)
    tensors = {each.name: each._replace(start=data_start + each.start) for each in infos}
    if len(tensors) < len(infos):
        raise CheckpointError(f"{path} holds a tensor twice. Download it again.")
    end = max((each.start + each.size for each in tensors.values()), default=data_start)
    if end > len(content):
        raise CheckpointError(f"{path} is cut short: {len(content):,} of {end:,} bytes. Download it again.")
    span = (start, reader.place)
    return GgufFile(path, version, alignment, values, tensors, entries, span, data_start, end)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


class _Reader:
    """Reads one value after the other; what does not fit the file is a CheckpointError."""

    def __init__(self, content: mmap.mmap, path: Path, place: int) -> None:
        self.content, self.path, self.place = content, path, place

    def _broken(self) -> CheckpointError:
        return CheckpointError(f"{self.path} has a broken GGUF header near byte {self.place:,}. Download it again.")

    def number(self, form: str) -> Any:
        """Return one number of a format of `struct`."""
        try:
            (value,) = struct.unpack_from(f"<{form}", self.content, self.place)
        except struct.error:
            raise self._broken() from None
        self.place += struct.calcsize(f"<{form}")
        return value

    def _take(self, count: int) -> int:
        """Pass over `count` bytes; return where they begin."""
        start = self.place
        if count > len(self.content) - start:
            raise self._broken()
        self.place += count
        return start

    def text(self) -> str:
        """Return a text."""
        count = self.number("Q")
        start = self._take(count)
        return self.content[start : start + count].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Return a number or a text."""
        if kind == STRING:
            return self.text()
        if kind not in _FORMATS:
            raise self._broken()
        return self.number(_FORMATS[kind])

    def _array_head(self) -> tuple[int, int]:
        kind, count = self.number("I"), self.number("Q")
        if kind not in (STRING, *_FORMATS) or count > len(self.content):
            raise self._broken()
        return kind, count

    def skip_array(self) -> None:
        """Pass over an array."""
        kind, count = self._array_head()
        if kind != STRING:
            self._take(count * struct.calcsize(f"<{_FORMATS[kind]}"))
            return
        unpack, content, place, end = struct.Struct("<Q").unpack_from, self.content, self.place, len(self.content)
        for _ in range(count):
            if place > end - 8:
                raise self._broken()
            place += 8 + unpack(content, place)[0]
        self.place = place
        self._take(0)

    def array(self) -> list[Any]:
        """Return the items of an array."""
        kind, count = self._array_head()
        if kind == STRING:
            return [self.text() for _ in range(count)]
        size = struct.calcsize(f"<{_FORMATS[kind]}")
        start = self._take(count * size)
        return list(struct.unpack(f"<{count}{_FORMATS[kind]}", self.content[start : start + count * size]))

    def info(self) -> GgufTensor:
        """Return the description of one tensor; its start is counted from the data."""
        name, num_dimensions = self.text(), self.number("I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise self._broken()
        shape = tuple(self.number("Q") for _ in range(num_dimensions))[::-1]
        kind, start = self.number("I"), self.number("Q")
        if kind not in BLOCKS:
            raise CheckpointError(f"{self.path}: '{name}' is of a tensor type ({kind}) that longext does not know.")
        values, size = BLOCKS[kind]
        return GgufTensor(name, kind, shape, start, math.prod(shape) // values * size)


# --- write ------------------------------------------------------------------------------------------------------------


def write_changed(
    source: GgufFile,
    target: Path,
    keys: Mapping[str, Value | None],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `source` to `target` with other keys (None: left out) and further float32 tensors behind its own.

    Every other key, and the data of every tensor, is copied as it is; nothing is held in memory but 16 MB of it.

    Args:
        on_progress: called with the bytes of data just written.
    """
    with source.path.open("rb") as file, target.open("wb") as out:
        out.write(_new_header(source, file, keys, tensors))
        out.write(bytes(_padded(out.tell(), source.alignment) - out.tell()))
        file.seek(source.data_start)
        written = 0
        for block in _pieces(file, source.data_end - source.data_start):
            out.write(block)
            written += len(block)
            if on_progress:
                on_progress(len(block))
        for values in tensors.values():
            out.write(bytes(_padded(written, source.alignment) - written))
            written = _padded(written, source.alignment) + out.write(values.astype("<f4").tobytes())
        out.write(bytes(_padded(written, source.alignment) - written))


def _new_header(
    source: GgufFile, file: BinaryIO, keys: Mapping[str, Value | None], tensors: Mapping[str, np.ndarray[Any, Any]]
) -> bytes:
    def span(start: int, end: int) -> bytes:
        file.seek(start)
        return file.read(end - start)

    kept = [span(each.start, each.end) for name, each in source.entries.items() if name not in keys]
    added = [_text(name) + _packed(*value) for name, value in keys.items() if value is not None]
    place, infos = source.data_end - source.data_start, [span(*source.infos)]
    for name, values in tensors.items():
        place = _padded(place, source.alignment)
        dimensions = values.shape[::-1]
        infos.append(_text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, F32, place))
        place += values.size * 4
    counts = struct.pack("<IQQ", source.version, len(source.tensors) + len(tensors), len(kept) + len(added))
    return MAGIC + counts + b"".join([*kept, *added, *infos])


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _packed(kind: int, value: Any) -> bytes:
    content = _text(value) if kind == STRING else struct.pack(f"<{_FORMATS[kind]}", value)
    return struct.pack("<I", kind) + content


def _padded(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _pieces(file: BinaryIO, count: int) -> Iterator[bytes]:
    while count > 0:
        block = file.read(min(_CHUNK, count))
        if not block:
            raise CheckpointError(f"{file.name} is cut short. Download it again.")
        count -= len(block)
        yield block
