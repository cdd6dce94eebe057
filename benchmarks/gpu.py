"""Everything that longext says of a GPU, measured by one command: at most 8 minutes on one 80 GB card, no downloads.

Models have the shapes of real ones and random weights. Parity is checked first. After every measurement DIR/result.json
and DIR/gpu.md are written anew, so that a run that is cut off loses nothing, and what other runs have measured into DIR
stays there.

    python benchmarks/gpu.py [--part NAME[,NAME]] [--out DIR] [--budget SECONDS] [--list] [--device cpu --tiny]

Not part of the default: `variants-more` (4 minutes), `profile` (1), `sweep-full` (3), `sweep-1m` (6).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # also if this file is imported, by a test

from gpu_parts import evaluation, kernels, parity, training
from gpu_parts.base import GIB, Measurement, NotAvailable, Setting, one_line, transformers_as_it_is

PARTS = {
    "parity": parity.parity,
    "table": training.table,
    "variants": training.variants,
    "sweep": training.sweep,
    "kernels": kernels.kernels,
    "eval": evaluation.evaluation,
    "variants-more": training.more_variants,
    "profile": training.profile,
    "sweep-full": training.sweep_full,
    "sweep-1m": training.sweep_1m,
}
DEFAULT = ("parity", "table", "variants", "sweep", "kernels", "eval")
BUDGET = 450.0  # what is left of 8 minutes behind a start
# what is to be reached -> beginnings of the measurements that count, figures at least, figures at most
GOALS: dict[str, tuple[tuple[str, ...], dict[str, float], dict[str, float]]] = {
    "7B shape, 32,768 tokens: 10,000 tokens/s, 24 GiB": (
        ("table/32768/longext", "variants/32768", "variants-more/32768"),
        {"tokens_per_second": 10_000},
        {"peak_gib": 24},
    ),
    "7B shape, 98,304 tokens: 8,500 tokens/s, 40 GiB": (
        ("table/98304/longext", "variants/98304", "variants-more/98304"),
        {"tokens_per_second": 8500},
        {"peak_gib": 40},
    ),
    "8B shape, 1,048,576 tokens, S2-Attn: 6 minutes, 40 GiB, 45 GB of the host": (
        ("sweep-1m",),
        {},
        {"step_seconds": 360, "peak_gib": 40, "host_gib": 45e9 / GIB},
    ),
    "8B shape, 131,072 tokens, full attention: 90 s, 45 GiB": (
        ("sweep-full",),
        {},
        {"step_seconds": 90, "peak_gib": 45},
    ),
}
_HIDDEN = ("name", "status", "device", "versions", "tokens", "kernels")  # figures that tables leave out
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "liger-kernel", "flash-attn", "triton")


def main(arguments: list[str] | None = None) -> int:
    """Measure, and return the exit code: 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(DEFAULT), help=f"of {', '.join(PARTS)}, or part/name/...")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--budget", type=float, default=BUDGET, help="nothing starts that would end after it")
    parser.add_argument("--list", action="store_true", help="print measurements with their estimates, run nothing")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a dry run: tiny models and rows, float32")
    options = parser.parse_args(arguments)
    setting = Setting(torch.device(options.device), options.tiny)
    chosen = choose(options.part.split(","), setting)
    if options.list:
        print("\n".join(f"{one.seconds:6.0f} s  {one.name}" for one in chosen))
        print(f"{sum(one.seconds for one in chosen):6.0f} s  in all")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA device. A dry run: --device cpu --tiny")
    record = Record(options.out, setting)
    print(f"{record.facts['device']}; {record.facts['versions']}", flush=True)
    started = time.perf_counter()
    for one in chosen:
        spent = time.perf_counter() - started
        if spent + one.seconds > options.budget and not setting.tiny:
            record.add(one, {"status": f"not run: {one.seconds:.0f} s would end after the budget"}, spent)
            continue
        record.add(one, measure(setting, one), spent)
    print(f"{time.perf_counter() - started:.0f} s in all; {options.out}/result.json, {options.out}/gpu.md")
    return int(any(row["status"].startswith("failed") for row in record.rows.values()))


def choose(parts: list[str], setting: Setting) -> list[Measurement]:
    """Return the measurements of the named parts, or those whose names begin with "part/what".

    Raises:
        SystemExit: nothing has that name.
    """
    chosen: dict[str, Measurement] = {}
    for part in parts:
        name = part.split("/")[0]
        found = PARTS[name](setting) if name in PARTS else []
        found = [one for one in found if f"{one.name}/".startswith(f"{part}/")]
        if not found:
            sys.exit(f"--part {part}: no measurement has that name. Parts: {', '.join(PARTS)}; --list shows all names.")
        chosen.update({one.name: one for one in found})
    return list(chosen.values())


def measure(setting: Setting, one: Measurement) -> dict[str, Any]:
    """Run one measurement and return its row: figures, or what kept it from having any."""
    from longext.errors import LongextError

    setting.free()
    setting.reset_peaks()
    started = time.perf_counter()
    try:
        with transformers_as_it_is():
            row = {"status": "ok", **one.run()}
    except torch.OutOfMemoryError:
        row = {"status": "out of memory", **setting.peaks()}
    except NotAvailable as reason:
        row = {"status": f"not available: {reason}"}
    except LongextError as error:
        row = {"status": f"refused: {one_line(error)}"}
    except Exception as error:
        if "out of memory" in str(error):  # of pinned host memory
            row = {"status": f"out of memory: {one_line(error)}", **setting.peaks()}
        else:
            traceback.print_exc()
            row = {"status": f"failed: {one_line(error)}"}
    return {**row, "seconds": time.perf_counter() - started}


class Record:
    """The results in a directory: result.json and gpu.md, written after every measurement."""

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.directory, self.file = directory, directory / "result.json"
        directory.mkdir(parents=True, exist_ok=True)
        versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES if _is_installed(name)]
        cuda = setting.device.type == "cuda"
        self.facts = {
            "device": torch.cuda.get_device_name() if cuda else f"cpu{', dry run' * setting.tiny}",
            "versions": ", ".join(versions),
        }
        known = json.loads(self.file.read_text()) if self.file.is_file() else {"measurements": []}
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in known["measurements"]}

    def add(self, one: Measurement, row: dict[str, Any], at: float) -> None:
        """Add or replace a row, write both files, print a line."""
        if row["status"].startswith("not run") and one.name in self.rows:
            return  # an earlier run has it
        self.rows[one.name] = {"name": one.name, **row, **self.facts}
        text = json.dumps({"measurements": list(self.rows.values())}, indent=1)
        partial = self.file.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.file)
        (self.directory / "gpu.md").write_text(markdown(list(self.rows.values())))
        shown = ", ".join(f"{key} {_cell(value)}" for key, value in row.items() if key not in _HIDDEN)
        print(f"[{at:5.0f} s] {one.name}: {row['status']}; {shown}", flush=True)


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return tables of all rows: the columns of `table` side by side, of every other part one row a measurement."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["name"].split("/")[0], []).append(row)
    facts = sorted({f"{row['device']}; {row['versions']}" for row in rows})
    lines = ["# GPU measurements", "", *(f"- {fact}" for fact in facts), "", *_goal_lines(rows)]
    for part, own in parts.items():
        lines += ["", f"## {part}", "", *(_table_lines(own) if part == "table" else _lines(own))]
    return "\n".join(lines) + "\n"


def _goal_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| goal | reached | nearest |", "|:--|:--|:--|"]
    for text, (beginnings, at_least, at_most) in GOALS.items():
        keys = {**at_least, **at_most}
        own = [row for row in rows if row["name"].startswith(beginnings) and keys.keys() <= row.keys()]
        if not own:
            lines.append(f"| {text} | not run | |")
            continue
        share, row = max(((_share(row, at_least, at_most), row) for row in own), key=lambda pair: pair[0])
        figures = ", ".join(f"{_cell(float(row[key]))} {key.replace('_', ' ')}" for key in keys)
        lines.append(f"| {text} | {'yes' if share >= 1 else 'no'} | {row['name']}: {figures} |")
    peaks = {row["name"].split("/")[0]: row["peak_gib"] for row in rows if "/s2/" in row["name"] and "peak_gib" in row}
    if {"sweep", "sweep-1m"} <= peaks.keys():
        ratio = peaks["sweep-1m"] / peaks["sweep"]
        answer = "yes" if abs(ratio - 1) <= 0.02 else "no"
        lines.append(f"| 8B shape: peak at 1,048,576 within 2 % of 262,144 | {answer} | {ratio:.3f} of it |")
    return lines


def _share(row: dict[str, Any], at_least: dict[str, float], at_most: dict[str, float]) -> float:
    """Return how much of a goal a row reaches, by its worst figure; at least 1 if all of it."""
    shares = [row[key] / bound for key, bound in at_least.items()]
    return min(shares + [bound / max(row[key], 1e-9) for key, bound in at_most.items()])


def _table_lines(rows: list[dict[str, Any]]) -> list[str]:
    cells: dict[str, dict[str, tuple[str, str]]] = {}
    for row in rows:
        _, length, column = row["name"].split("/")
        is_ok = row["status"] == "ok"
        rate = f"{row['tokens_per_second']:,.0f}" if is_ok else row["status"].partition(":")[0]
        cells.setdefault(length, {})[column] = (rate, f"{row['peak_gib']:.1f}" if is_ok and "peak_gib" in row else "-")
    names = list(dict.fromkeys(name for columns in cells.values() for name in columns))
    heads = " | ".join(f"{name} tok/s | GiB" for name in names)
    lines = [f"| tokens | {heads} |", "|--:|" + "--:|--:|" * len(names)]
    for length, columns in cells.items():
        pairs = (columns.get(name, ("not run", "-")) for name in names)
        lines.append(f"| {int(length):,} | " + " | ".join(f"{rate} | {peak}" for rate, peak in pairs) + " |")
    return lines


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in (*_HIDDEN, "seconds")))
    lines = ["| | " + " | ".join(key.replace("_", " ") for key in keys) + " | |", "|:--|" + "--:|" * len(keys) + ":--|"]
    for row in rows:
        values = [_cell(row[key]) if key in row else "" for key in keys]
        status = "" if row["status"] == "ok" else row["status"]
        name = row["name"].partition("/")[2].replace("/", ", ")
        lines.append(f"| {name} | {' | '.join(values)} | {status} |")
    return lines


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
