"""What every part uses: measurements, the sizes of models and rows, random models, peaks of memory."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
_TINY = 128  # a dry run divides every number of tokens by this
SHAPES = {
    "llama2-7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11_008, "vocab_size": 32_000, "max_position_embeddings": 4096,
    },
    "llama3-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14_336, "vocab_size": 128_256, "max_position_embeddings": 8192,
    },
    "llama3.2-1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128_256, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "parity": {
        "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 2816, "vocab_size": 4096, "max_position_embeddings": 4096,
    },
}  # fmt: skip


class NotAvailable(Exception):
    """What a measurement asks for is not on this machine, or not in this version."""


@dataclass(frozen=True)
class Measurement:
    """One row of the results.

    Attributes:
        name: "part/what/which"; `--part` takes it or any beginning of it that ends before a slash.
        seconds: estimate on an 80 GB card, its model included.
        run: -> figures by name.
    """

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]] = field(compare=False)


@dataclass(frozen=True)
class Setting:
    """Where measurements run, and how large they are."""

    device: torch.device
    tiny: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of weights: bfloat16; float32 in a dry run."""
        return torch.float32 if self.tiny else torch.bfloat16

    def tokens(self, number: int) -> int:
        """Return a number of tokens; a dry run's are fewer."""
        return max(4, number // _TINY) if self.tiny else number

    def shape(self, name: str) -> dict[str, Any]:
        """Return the sizes of a model; a dry run keeps the ratio of heads alone."""
        shape = SHAPES[name]
        if not self.tiny:
            return shape
        groups = shape["num_attention_heads"] // shape["num_key_value_heads"]
        return {
            **shape, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 16_384,
            "num_attention_heads": 4, "num_key_value_heads": max(1, 4 // groups), "max_position_embeddings": 64,
        }  # fmt: skip

    def build(self, shape: str, length: int, attention: str, dtype: torch.dtype | None = None) -> Any:
        """Return a Llama with random weights, made on the device, its RoPE interpolated to `length`."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        sizes = self.shape(shape)
        factor = max(1.0, length / sizes["max_position_embeddings"])
        rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": factor}
        sizes = {**sizes, "max_position_embeddings": max(length, sizes["max_position_embeddings"])}
        with self.device:
            return AutoModelForCausalLM.from_config(
                LlamaConfig(**sizes, rope_parameters=rope, bos_token_id=1, eos_token_id=2),
                attn_implementation=attention,
                dtype=self.dtype if dtype is None else dtype,
            )

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Return the mean seconds of `work` after one warm-up."""
        work()
        self.synchronise()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronise()
        return (time.perf_counter() - started) / repeats

    def free(self) -> None:
        """Give back what earlier measurements left, on the device and in pinned host memory."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            getattr(torch._C, "_host_emptyCache", lambda: None)()

    def reset_peaks(self) -> None:
        """Begin to count peaks of memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            getattr(torch.cuda, "reset_peak_host_memory_stats", lambda: None)()
        with contextlib.suppress(OSError):  # Linux: forget the peak of resident memory
            Path("/proc/self/clear_refs").write_text("5")

    def peaks(self) -> dict[str, float]:
        """Return GiB since `reset_peaks`: allocated on the device; pinned; of the host, pinned included."""
        if self.device.type == "cpu":
            return {"host_gib": resident("VmHWM")}
        stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
        pinned = stats.get("allocated_bytes.peak", 0) / GIB
        return {
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "pinned_gib": pinned,
            "host_gib": resident("VmHWM") + (0.0 if pinned_is_resident() else pinned),
        }


def resident(field: str) -> float:
    """Return the host memory of this process now (VmRSS) or at its peak (VmHWM), in GiB; 0 elsewhere than on Linux."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / GIB
    return 0.0


@functools.cache
def pinned_is_resident() -> bool:
    """Return whether this driver's pinned memory counts as resident: true of some, not of all."""
    before = resident("VmRSS")
    held = torch.ones(GIB // 4, dtype=torch.uint8, pin_memory=True)
    return bool(resident("VmRSS") - before > held.numel() / GIB / 2)


@contextlib.contextmanager
def transformers_as_it_is() -> Iterator[None]:
    """Undo on leaving what Liger puts in place of functions of transformers' Llama: later measurements have it too."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    try:
        yield
    finally:
        vars(modeling_llama).update(before)


@contextlib.contextmanager
def sdpa_backend(name: str) -> Iterator[None]:
    """Make torch's SDPA take one kernel: flash, cudnn, efficient or math; "any" leaves the choice to torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    with contextlib.nullcontext() if name == "any" else sdpa_kernel(getattr(SDPBackend, kernels[name])):
        yield


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
