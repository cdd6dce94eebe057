"""Accelerators by name: how much memory a program can use on them and how fast their dense matrix units are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from longext.errors import ConfigError
from longext.registry import Registry
from longext.untrusted import shown

GIB = 2**30
_COUNTED = re.compile(r"^\s*(?:(\d+)\s*[xX*]\s*)?(\S+)\s*$", re.ASCII)
_MOST = 10**6  # GPUs in one machine room


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator.

    Attributes:
        name: vendor's name and memory, for example A100-80GB.
        memory: bytes the driver reports as total (less than the name says: vendors count some for ECC and firmware).
        tflops: dense peak of the matrix units at 16 bits with 32-bit accumulation, 1e12 FLOP/s, from the data sheet.
        bandwidth: of its memory, 1e9 bytes a second, from the data sheet.
        has_bfloat16: False if only float16 runs on the matrix units.
    """

    name: str
    memory: int
    tflops: float
    bandwidth: float
    has_bfloat16: bool = True


DEVICES: Registry[Device] = Registry("GPU")


_SIXTEEN_BIT = {  # GiB, peak in TFLOP/s, GB/s of memory
    "V100-16GB": (15.7, 125.0, 900.0),
    "V100-32GB": (31.7, 125.0, 900.0),
    "T4-16GB": (14.6, 65.0, 320.0),
    "A10-24GB": (22.0, 125.0, 600.0),
    "A30-24GB": (23.5, 165.0, 933.0),
    "A40-48GB": (44.4, 149.7, 696.0),
    "A6000-48GB": (47.4, 154.8, 768.0),
    "A100-40GB": (39.4, 312.0, 1555.0),
    "A100-80GB": (79.2, 312.0, 2039.0),
    "L4-24GB": (22.0, 121.0, 300.0),
    "L40S-48GB": (44.4, 362.0, 864.0),
    "RTX-3090-24GB": (23.6, 71.0, 936.0),
    "RTX-4090-24GB": (23.5, 165.2, 1008.0),
    "RTX-5090-32GB": (31.4, 209.5, 1792.0),
    "H100-80GB": (79.2, 989.0, 3352.0),
    "H100-PCIe-80GB": (79.2, 756.0, 2039.0),
    "H200-141GB": (139.8, 989.0, 4800.0),
    "B200-180GB": (178.0, 2250.0, 8000.0),
    "MI250X-128GB": (127.0, 383.0, 3277.0),
    "MI300X-192GB": (191.0, 1307.0, 5300.0),
}
for _name, (_gib, _tflops, _bandwidth) in _SIXTEEN_BIT.items():
    _device = Device(
        name=_name,
        memory=round(_gib * GIB),
        tflops=_tflops,
        bandwidth=_bandwidth,
        has_bfloat16=not _name.startswith(("V100", "T4")),
    )
    DEVICES.register(_name, _device)


def parse_gpus(text: str) -> tuple[int, Device]:
    """Return (number, device) of `8xA100-80GB`.

    No number means one, case does not matter, and the memory may be left out if it is not in doubt (`H200`).

    Raises:
        ConfigError: not of that form, none of them, or a device that is not in the table (names the nearest).
    """
    match = _COUNTED.match(text)
    if match is None:
        raise ConfigError(f"--gpus takes a number and a name, for example 8xA100-80GB, got '{text}'.")
    count = int((match[1] or "1")[:12])
    if not 1 <= count <= _MOST:
        raise ConfigError(f"--gpus needs at least one GPU and at most {_MOST:,}, got {shown(text)}.")
    wanted = match[2].lower()
    fitting = [name for name in DEVICES if name.lower() == wanted] or [
        name for name in DEVICES if name.lower().rsplit("-", 1)[0] == wanted
    ]
    return count, DEVICES[fitting[0] if len(fitting) == 1 else match[2]]
