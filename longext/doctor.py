"""What longext finds on this machine: versions, devices, kernels, folders, memory; what works, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longext import extras
from longext.data.cache import cache_root
from longext.manifest import versions

_PACKAGES = (
    "torch transformers peft accelerate datasets lm-eval tokenizers safetensors huggingface-hub numpy matplotlib "
    "flash-attn liger-kernel bitsandbytes gguf llama-cpp-python"
).split()
_CORE = "extend, inspect, plan, recipes; verify without logits"
_FEATURES = {  # extra -> what it is for
    "train": "finetune, compress-train, merge, convert",
    "eval": "eval, passkey, advise, search, generate; verify with logits",
    "report": "report, compare, pictures",
    "gguf": "GGUF files",
    "flash": "flash-attn's kernels",
    "liger": "Liger's kernels in training",
    "qlora": "finetune --quantize nf4",
    "zh": "Chinese tasks of LongBench",
    "wandb": "--report-to wandb",
}
_SPEEDUPS = ("gguf", "flash", "liger", "qlora", "zh", "wandb")  # nobody misses them who did not ask for them
_ON_CUDA = ("flash", "liger", "qlora")


@dataclass(frozen=True)
class Feature:
    """One thing that longext can do: what it lacks here ("" if it works), and the line that installs it."""

    name: str
    extra: str
    why_not: str
    install: str


def examine() -> dict[str, Any]:
    """Return what a bug report needs, as a JSON object.

    Packages are imported only to see what they find: torch for devices and kernels, flash-attn and torchvision because
    a build for another torch fails when it is imported.

    Returns:
        {"platform", "packages": {name: version or None}, "devices": [{"name", "memory", "free", "bfloat16"}] (bytes),
        "kernels": {name: what it is or why it is not there}, "folders": [{"what", "path", "free", "writable"}],
        "memory": {"total", "available", "cores"}, "features": [{"name", "extra", "why_not", "install"}],
        "problems": [one line each]}
    """
    devices, kernels, problems = _accelerators()
    problems = [*_outside_of_what_is_allowed(), *problems, *_broken_imports()]
    has_cuda = any(device["kind"] == "cuda" for device in devices)
    return {
        "platform": platform.platform(),
        "packages": {**{name: _version(name) for name in _PACKAGES}, **versions()},
        "devices": devices,
        "kernels": kernels,
        "folders": list(_folders()),
        "memory": _memory(),
        "features": [vars(feature) for feature in _features(has_cuda)],
        "problems": problems,
    }


def verdict(found: dict[str, Any]) -> str:
    """Return what works here in one or two sentences."""
    off = [each for each in found["features"] if each["why_not"] and each["extra"] not in _SPEEDUPS]
    devices = [device["name"] for device in found["devices"]]
    where = f"on {extras.in_words(devices)}" if devices else "on the CPU"
    works = f"Everything that longext needs is here; models run {where}."
    if off:
        line = extras.install_line(each["extra"] for each in off)
        works = f"{_CORE.split(';')[0]} work here. For the rest: {line}"
    count = len(found["problems"])
    return works if not count else f"{count} problem{'s' if count > 1 else ''}, see below. {works}"


# --- packages ---------------------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _outside_of_what_is_allowed() -> Iterator[str]:
    """Yield one line for each installed package whose version longext was not made for."""
    from packaging.requirements import Requirement

    try:
        listed = importlib.metadata.requires("longext") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that nobody installed
        return
    extras_of_ours = [{"extra": extra} for extra in ("", *_FEATURES)]  # not those that develop longext
    ranges = {
        requirement.name: requirement
        for requirement in map(Requirement, listed)
        if requirement.specifier and (not requirement.marker or any(map(requirement.marker.evaluate, extras_of_ours)))
    }
    for name, requirement in ranges.items():
        there = _version(name)
        if there is not None and not requirement.specifier.contains(there, prereleases=True):
            wanted = f"{name}{requirement.specifier}"
            yield f"{name} {there} is installed, longext takes {wanted}: pip install '{wanted}'"


def _broken_imports() -> Iterator[str]:
    """Yield one line for each package that is installed and cannot be imported beside this torch.

    transformers imports torchvision where it finds it, so that a broken one breaks models that show no picture.
    """
    for module, advice in (
        ("flash_attn", "pip install --no-build-isolation --force-reinstall flash-attn"),
        ("torchvision", "pip uninstall torchvision, or install the build for this torch"),
    ):
        if extras.has("torch", module):
            try:
                __import__(module)
            except Exception as error:  # whatever a compiled extension raises
                yield f"{extras.project(module)} does not load beside this torch ({_one_line(error)}): {advice}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _features(has_cuda: bool) -> Iterator[Feature]:
    yield Feature(_CORE, "", "", "")
    for extra, name in _FEATURES.items():
        missing = extras.absent(extras.NEEDED[extra])
        lacks = [extras.project(module) for module in missing]
        if extra in _ON_CUDA and not has_cuda:
            lacks.append("a CUDA device")
        why = f"needs {extras.in_words(lacks)}" if lacks else ""
        yield Feature(name, extra, why, extras.install_line([extra]) if missing else "")


# --- the machine ------------------------------------------------------------------------------------------------------


def _accelerators() -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """Return (devices, kernels, problems)."""
    driver = Path("/proc/driver/nvidia/version").exists()
    if not extras.has("torch"):
        return [], {}, []
    try:
        import torch
    except Exception as error:  # a build for another machine
        return [], {}, [f"torch does not load ({_one_line(error)}): install it again for this machine"]
    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            facts = {"memory": total, "free": free, "bfloat16": torch.cuda.is_bf16_supported()}
        except RuntimeError as error:  # busy or broken: say so where it is looked for
            facts = {"error": _one_line(error)}
        devices.append({"kind": "cuda", "name": torch.cuda.get_device_name(index), **facts})
    if torch.backends.mps.is_available():
        devices.append({"kind": "mps", "name": "Apple GPU"})
    problems = [f"{each['name']} cannot be used: {each['error']}" for each in devices if "error" in each]
    if driver and not devices:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        problems.append(
            f"an NVIDIA driver is loaded and torch {torch.__version__} ({built}) sees no device: install a build of "
            "torch that this driver can run (nvidia-smi shows its CUDA version)"
        )
    has_cuda = any(device["kind"] == "cuda" for device in devices)
    return devices, _kernels(torch, has_cuda), problems


def _kernels(torch: Any, has_cuda: bool) -> dict[str, str]:
    """Return attention and training kernels by name: what they are, or why they are not used."""
    varlen = extras.has("torch.nn.attention.varlen")
    return {
        "sdpa": f"torch {torch.__version__}" + ("" if has_cuda else ", on the CPU"),
        "flash-attn": _version("flash-attn") or "not installed",
        "variable length": "torch's" if varlen and has_cuda else "needs a CUDA device",
        "liger": _version("liger-kernel") or "not installed",
        "torch.compile": "a C compiler is there" if shutil.which("cc") or shutil.which("gcc") else "no C compiler (cc)",
    }


def _folders() -> Iterator[dict[str, Any]]:
    from huggingface_hub import constants

    for what, path in (
        ("Hub cache (HF_HOME)", Path(constants.HF_HUB_CACHE)),
        ("token cache (LONGEXT_CACHE)", cache_root()),
        ("this folder", Path.cwd()),
    ):
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        writable = os.access(there, os.W_OK)
        yield {"what": what, "path": str(path), "free": shutil.disk_usage(there).free, "writable": writable}


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"total": memory.total, "available": memory.available, "cores": cores}
