"""Tables of `doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longext.report.tables import Table

_GIB = 2**30


def doctor_tables(found: Mapping[str, Any]) -> list[Table]:
    """What works, the machine, and the packages, of the facts that `longext.doctor.examine` returns."""
    features = [[each["name"], each["extra"], each["why_not"] or "works"] for each in found["features"]]
    missing = [each["install"] for each in found["features"] if each["install"]]
    how = f"An extra is installed so: {missing[0]}" if missing else ""
    machine = [["platform", found["platform"]], ["python", found["packages"]["python"]]]
    for device in found["devices"]:
        sizes = f", {_gib(device['free'])} of {_gib(device['memory'])} free" if "memory" in device else ""
        half = "" if device.get("bfloat16", True) else ", no bfloat16"
        error = f", cannot be used: {device['error']}" if "error" in device else ""
        machine.append(["device", f"{device['name']}{sizes}{half}{error}"])
    if not found["devices"]:
        machine.append(["device", "CPU"])
    memory = found["memory"]
    free = f"{_gib(memory['available'])} of {_gib(memory['total'])} available, {memory['cores']} core(s)"
    machine.append(["memory", free])
    for folder in found["folders"]:
        state = "" if folder["writable"] else ", not writable"
        machine.append([folder["what"], f"{folder['path']}: {_gib(folder['free'])} free{state}"])
    machine += [[f"kernel: {name}", what] for name, what in found["kernels"].items()]
    packages = [[name, version or "not installed"] for name, version in found["packages"].items() if name != "python"]
    return [
        Table("what works", ["", "extra", "here"], features, left=frozenset({1, 2}), caption=how),
        Table("machine", ["", ""], machine, left=frozenset({1})),
        Table("versions", ["package", "version"], packages, left=frozenset({1})),
    ]


def _gib(size: int) -> str:
    return f"{size / _GIB:,.1f} GiB"
