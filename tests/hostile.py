"""Hostile variants of the files that longext reads: seeded mutations of valid ones, and a table of known troubles."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = 100_000
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        1.5,
        -0.0,
        1e-300,
        1e308,
        2**31,
        2**63,
        10**30,
        "",
        "text",
        "8",
        "\ud800",
        "a\0b",
    ),
    *(
        [],
        {},
        [1],
        [[]],
        {"a": 1},
        [None],
        {"__float__": "Infinity"},
        {"__float__": "NaN"},
        "/etc/passwd",
        "x" * 10_000,
    ),
]
# Texts of values that JSON has not, put in place of a number or text.
RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * DEEP,
    '{"a":' * DEEP,
    "'x'",
    "0x10",
    "01",
    "undefined",
    "",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the value itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [own for key, item in items for own in ((*path, key), *places(item, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], item: Any) -> Any:
    """A copy of `value` with `item` at `path`."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = item
    return value


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy of `value` without what is at `path`."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return value


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """A hostile variant of a JSON text: a value of another kind, a key less or twice, or a broken text."""
    path = rng.choice(places(value))
    kind = rng.choice(("value", "value", "value", "value", "raw", "missing", "missing", "twice", "text"))
    if kind == "value":
        return json.dumps(put(value, path, rng.choice(VALUES))).encode()
    if kind == "raw":
        return json.dumps(put(value, path, "@@")).replace('"@@"', rng.choice(RAW)).encode()
    if kind == "missing":
        return json.dumps(without(value, path)).encode()
    if kind == "twice":
        text = json.dumps(value)
        return (
            (text[:-1] + ", " + json.dumps(next(iter(value))) + ": 1}").encode() if isinstance(value, dict) else b"[1,"
        )
    return broken_text(json.dumps(value).encode(), rng)


def broken_text(content: bytes, rng: random.Random) -> bytes:
    """A text cut off, of another encoding, or with bytes in it that are none of it."""
    at = rng.randrange(len(content))
    return rng.choice(
        (
            content[:at],
            b"",
            b"   \n",
            b"\xef\xbb\xbf" + content,
            content.decode(errors="replace").encode("utf-16"),
            content[:at] + b"\xff" + content[at:],
            content[:at] + b"\0" + content[at:],
            content + content,
            b"[" * DEEP,
            b"null",
            b"[]",
            b"\x1f\x8b\x08\0" + content[:20],
        )
    )


def hostile_file(path: Path, rng: random.Random) -> None:
    """Put something that is no file at `path`."""
    path.unlink(missing_ok=True)
    kind = rng.choice(("fifo", "directory", "link", "loop"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "loop" else "nowhere")


# --- safetensors ------------------------------------------------------------------------------------------------------


def safetensors_bytes(content: bytes, rng: random.Random) -> bytes:
    """A hostile variant of a safetensors file: its header, the length of it, or the data."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.choice(("header",) * 8 + ("length", "cut", "longer", "text", "empty", "deep"))
    if kind == "length":
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1))) + content[8:]
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "longer":
        return content + b"\0" * rng.choice((1, 100))
    if kind == "text":
        return with_header(json_bytes(header, rng), data)
    if kind == "empty":
        return with_header(b"{}", b"")
    if kind == "deep":
        return with_header(b'{"a":' * DEEP, data)
    return with_header(json.dumps(HEADERS[rng.choice(sorted(HEADERS))](header, rng)).encode(), data)


def with_header(text: bytes, data: bytes) -> bytes:
    """A safetensors file of a header's text and data."""
    return struct.pack("<Q", len(text)) + text + data


def _changed(key: str, *items: Any) -> Callable[[dict[str, Any], random.Random], dict[str, Any]]:
    def change(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        name = rng.choice([own for own in header if own != "__metadata__"])
        return put(header, (name, key), rng.choice(items))

    return change


def _swapped(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    return put(header, (one, "data_offsets"), header[other]["data_offsets"])


HEADERS: dict[str, Callable[[dict[str, Any], random.Random], dict[str, Any]]] = {
    "offsets": _changed("data_offsets", [0, 2**62], [-8, 0], ["0", "8"], [8, 0], [0], [0.0, 8.0], None, [0, 10**30]),
    "overlap": _swapped,
    "shape": _changed("shape", [-1], ["8"], [2**62, 2**62], [], [1.5], None, "8", [0]),
    "dtype": _changed("dtype", "F99", "I64", "BOOL", None, 8, "", "U8", "F64"),
    "entry": lambda header, rng: {**header, "x": rng.choice((None, [], {}, 1, "text"))},
    "metadata": lambda header, rng: {
        **header,
        "__metadata__": rng.choice((None, [], {"a": 1}, "text", {"longext": "["})),
    },
    "hole": lambda header, rng: without(header, (rng.choice([own for own in header if own != "__metadata__"]),)),
}

# --- YAML -------------------------------------------------------------------------------------------------------------

YAML = [
    *(
        "factor: 2020-13-45",
        "1: 2",
        "factor: 8\nfactor: 4",
        "? [a, b]\n: 1",
        "factor: &a [*a]",
        "<<: *a",
        "factor: !!int x",
    ),
    "a: &a [x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nfactor: [*c,*c,*c,*c,*c,*c]",
    *("factor: !!python/object/apply:os.system [id]", "[" * DEEP, "factor: " + "[" * DEEP, "{" * DEEP, "- " * 20_000),
    *(
        "factor: " + "9" * 5000,
        "factor: 1:1:1",
        "factor: .nan",
        "factor: .inf",
        "factor: 1e400",
        "factor: 1e300",
        "factor: 0",
    ),
    *(
        "factor: [8]",
        "factor: {a: 1}",
        "factor: yes",
        "factor: null",
        "method: 8",
        "method: [yarn]",
        "model: null",
        "output: ''",
    ),
    *(
        "\tfactor: 8",
        "factor 8",
        "factor: 'x",
        "factor: 8\n---\nfactor: 4",
        "%YAML 9.9\n---\na: 1",
        "",
        "null",
        "8",
        "- a",
        "\0",
    ),
    *(
        "no: 8",
        "~: 8",
        "factor: 0x" + "f" * 300,
        "factor: 2001-01-01 25:61:61",
        "rope_theta: -1",
        "rope_theta: .nan",
        "replace: 8",
    ),
    *(
        "target_length: 1e18",
        "target_length: -5",
        "original_length: 0",
        "revision: 2020-13-45",
        "beta_fast: .inf",
        "alpha: -.inf",
    ),
]

# --- rows -------------------------------------------------------------------------------------------------------------

ROWS: dict[str, Any] = {
    "text": {"text": "The keeper climbed the stairs. " * 4, "id": "a"},
    "alpaca": {"instruction": "Count.", "input": "one", "output": "two three"},
    "messages": {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two"}]},
    "longbench": {
        **{"input": "q", "context": "c", "answers": ["a"], "length": 3},
        **{"dataset": "hotpotqa", "all_classes": None, "_id": "x"},
    },
}
