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
        has_bfloat16: False where only float16 runs on the matrix units.
    """

    name: str
    memory: int
    tflops: float
    has_bfloat16: bool = True


DEVICES: Registry[Device] = Registry("GPU")


def _device(name: str, gib: float, tflops: float, has_bfloat16: bool = True) -> None:
    device = Device(name=name, memory=round(gib * GIB), tflops=tflops, has_bfloat16=has_bfloat16)
    DEVICES.register(name, device)


_device("V100-16GB", 15.7, 125.0, has_bfloat16=False)
_device("V100-32GB", 31.7, 125.0, has_bfloat16=False)
_device("T4-16GB", 14.6, 65.0, has_bfloat16=False)
_device("A10-24GB", 22.0, 125.0)
_device("A30-24GB", 23.5, 165.0)
_device("A40-48GB", 44.4, 149.7)
_device("A6000-48GB", 47.4, 154.8)
_device("A100-40GB", 39.4, 312.0)
_device("A100-80GB", 79.2, 312.0)
_device("L4-24GB", 22.0, 121.0)
_device("L40S-48GB", 44.4, 362.0)
_device("RTX-3090-24GB", 23.6, 71.0)
_device("RTX-4090-24GB", 23.5, 165.2)
_device("RTX-5090-32GB", 31.4, 209.5)
_device("H100-80GB", 79.2, 989.0)
_device("H100-PCIe-80GB", 79.2, 756.0)
_device("H200-141GB", 139.8, 989.0)
_device("B200-180GB", 178.0, 2250.0)
_device("MI250X-128GB", 127.0, 383.0)
_device("MI300X-192GB", 191.0, 1307.0)


def parse_gpus(text: str) -> tuple[int, Device]:
    """Return (number, device) of `8xA100-80GB`.

    No number means one, case does not matter, and the memory may be left out where it is not in doubt (`H200`).

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
