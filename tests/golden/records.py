"""What a case leaves, with marks in place of what is not the same everywhere, and how it differs from its record."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from golden.cases import CASES, arguments_of, with_needs
from golden.inputs import write_inputs

RECORDS = Path(__file__).parent / "records"
# files of an output that say what was computed, and can be compared
KEPT = (
    "result.json",
    "config.json",
    "compressor.json",
    "answers.jsonl",
    "samples.jsonl",
    "metrics.jsonl",
    "predictions/*.jsonl",
)
# Other CPUs add up in another order, and with other vector widths: float32 sums then differ in their last bits, which
# attention, training steps and exp() enlarge to some 1e-5 of a perplexity. A changed computation changes more. The
# absolute bound is for differences of losses that nearly cancel (1e-6 between AVX-512 and SSE kernels on one machine).
RELATIVE, ABSOLUTE = 1e-4, 1e-5

# the last part of a key -> what stands for its value
_MARKS = {
    "command": "<command>",
    "versions": "<versions>",
    "transformers_version": "<version>",
    "lm_eval": "<version>",
    "num_threads": "<threads>",
    "seconds": "<time>",
    "num_at_once": "<measured>",
    "peak_bytes": "<bytes>",
    "peak_memory_bytes": "<bytes>",
    "peak_memory_gib": "<bytes>",
    "weights_sha256": "<hash of trained weights>",
    "max_difference": "<rounding>",
}
_TIMES = re.compile(r".*(_seconds|_microseconds|_per_second)")
_TEXTS = (
    (re.compile(r"\A/(?:[^/\n]+/)+(?=[^/\n]+\Z)"), "<folder>/"),  # the whole text: the folder's name may have spaces
    (re.compile(r"(?<![\w<>.-])/(?:[^\s/]+/)+(?=[^\s/])"), "<folder>/"),
    (re.compile(r"(?<=lm-evaluation-harness )\d[\w.]*|(?<=lm-eval )\d[\w.]*"), "<version>"),
    (re.compile(r"(?<=largest relative error )[\d.e+-]+"), "<rounding>"),
)


def leftovers(folder: Path, name: str, printed: str) -> dict[str, Any]:
    """Return what a case left: file name -> content, for JSON lines a list; "stdout" where it wrote no directory."""
    if not CASES[name].writes:
        return {"stdout": json.loads(printed)}
    files = sorted(path for pattern in KEPT for path in (folder / name).glob(pattern))
    return {str(path.relative_to(folder / name)): _read(path) for path in files}


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def normalise(record: Any, measured: bool = True) -> Any:
    """Return a record with marks for what is not the same everywhere: times, machines, versions, folders, hashes.

    Args:
        measured: whether times and memory are measured, and so not the same everywhere; those of `plan` are computed.
    """
    if isinstance(record, dict):
        measured = measured and record.get("kind") != "plan"
        return dict(_normalise_item(key, value, measured) for key, value in record.items())
    if isinstance(record, list):
        return [normalise(value, measured) for value in record]
    if isinstance(record, str):
        for pattern, mark in _TEXTS:
            record = pattern.sub(mark, record)
        return record if len(record) <= 1000 else f"{record[:100]}... {_hash(record)}"
    return float(f"{record:.8g}") if isinstance(record, float) else record


def _hash(text: str) -> str:
    return f"({len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()})"


def _normalise_item(key: str, value: Any, measured: bool) -> tuple[str, Any]:
    if key.startswith("versions."):  # of a report, where a package more is a key more
        key, value = "versions", None
    name = key.rpartition(".")[2]
    if name == "files" and isinstance(value, dict):  # of a merge: file -> hash of its weights
        return key, dict.fromkeys(value, _MARKS["weights_sha256"])
    if measured and name in _MARKS:
        return key, _MARKS[name]
    if measured and _TIMES.fullmatch(name):
        return key, _MARKS["seconds"]
    return normalise(key), normalise(value, measured)


# Records of commands that are no evaluations had no such keys; one function writes the head of all of them now.
NEW_KEYS = ("command", "versions", "model", "protocol", "data")


def differences(stored: Any, found: Any, place: str = "") -> Iterator[str]:
    """Yield a line for every place where a record is not what is stored."""
    if type(stored) is not type(found):
        yield f"{place}: {_short(stored)} became {_short(found)}"
    elif isinstance(stored, dict):
        for key in sorted({*stored, *found}):
            if key not in found:
                yield f"{place}.{key}: gone (was {_short(stored[key])})"
            elif key not in stored and key not in NEW_KEYS:
                yield f"{place}.{key}: new ({_short(found[key])})"
            elif key in stored:
                yield from differences(stored[key], found[key], f"{place}.{key}")
    elif isinstance(stored, list):
        if len(stored) != len(found):
            yield f"{place}: {len(stored)} items became {len(found)}"
        for index, (old, new) in enumerate(zip(stored, found, strict=False)):
            yield from differences(old, new, f"{place}[{index}]")
    elif isinstance(stored, float):
        if not math.isclose(stored, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            yield f"{place}: {stored} became {found}"
    elif stored != found:
        yield f"{place}: {_short(stored)} became {_short(found)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def to_text(value: Any, indent: int = 0) -> str:
    """Return JSON with an item a line where it does not fit in one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or not value or len(line) + indent < 160:
        return line
    space = " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{space}{json.dumps(key)}: {to_text(item, indent + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(space + to_text(item, indent + 1) for item in value) + "\n" + " " * indent + "]"


def write_records(names: list[str]) -> None:
    """Run cases in a new folder and write their records."""
    import torch
    from typer.testing import CliRunner

    from longext.cli import app

    torch.set_num_threads(1)
    RECORDS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        os.environ["LONGEXT_CACHE"] = f"{made}/token-cache"
        folder = Path(made) / "work"
        write_inputs(folder)
        os.chdir(folder)
        for name in with_needs(*names):
            result = CliRunner().invoke(app, arguments_of(name))
            if result.exit_code != CASES[name].code:
                sys.exit(f"{name} ended with {result.exit_code}:\n{result.output}")
            if name in names:
                text = to_text(normalise(leftovers(folder, name, result.stdout)))
                (RECORDS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
                print(f"{len(text):>7,} bytes  {name}", flush=True)
        os.chdir(RECORDS)
