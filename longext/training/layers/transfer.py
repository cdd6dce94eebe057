"""Tensors that wait in host memory between forward and backward, copied while the device computes.

transformers' own offload (`save_on_cpu`) copies on the stream that computes, and pins new host memory for each tensor.
Here a second stream copies, out of blocks of pinned memory that are used again; in the backward pass the tensor that is
needed next comes back while the one before it is at work.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

# pinned memory is handed out in powers of two, so one block of a tensor's size could be twice what it needs
_LARGEST_BLOCK = 2**26


class CopyStream:
    """A CUDA stream for copies, and the order between it and the stream that computes."""

    pins = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def after_compute(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context whose work waits for what was computed so far, and not the other way round."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def mark(self) -> Any:
        """Return an event behind all copies so far."""
        return self._stream.record_event()

    def hold_compute(self, event: Any) -> None:
        """Let what is computed from now on wait for an event."""
        torch.cuda.current_stream(self._device).wait_event(event)


class NoStream:
    """The same on a CPU, where a copy is done when it returns."""

    pins = False

    def after_compute(self) -> contextlib.AbstractContextManager[Any]:
        """Return an empty context."""
        return contextlib.nullcontext()

    def mark(self) -> None:
        """Return nothing to wait for."""

    def hold_compute(self, event: None) -> None:
        """Wait for nothing."""


class Stored:
    """A tensor in host memory; dropping this object gives its blocks back.

    Attributes:
        on_device: the tensor itself until its copy is certainly done.
        fetched: the tensor that came back, until it is asked for.
    """

    def __init__(self, tensor: torch.Tensor, blocks: list[torch.Tensor], release: Callable[[Stored], None]) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.num_bytes = tensor.numel() * tensor.element_size()
        self.blocks = blocks
        self.on_device: torch.Tensor | None = tensor
        self.copied: Any = None
        self.fetched: torch.Tensor | None = None
        self.arrived: Any = None
        self.before: weakref.ref[Stored] | None = None
        self._release = release

    def __del__(self) -> None:
        self._release(self)


class Transfer:
    """Moves tensors to host memory and back, the last stored first.

    At any time the device holds, besides the tensor that was loaded last, at most one whose copy may be under way and
    one that was fetched ahead. The blocks stay for the next step.

    Attributes:
        num_bytes: host memory of all blocks.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._free: dict[int, list[torch.Tensor]] = {}
        self._stream: CopyStream | NoStream | None = None
        self._newest: Stored | None = None  # keeps it on the device: it is the first that a backward pass needs
        self._last: weakref.ref[Stored] | None = None

    def store(self, tensor: torch.Tensor) -> Stored:
        """Begin to copy a tensor to host memory; its device memory is free once the next one is stored."""
        tensor = tensor.detach().contiguous()
        if self._stream is None:
            self._stream = CopyStream(tensor.device) if tensor.is_cuda else NoStream()
        self._let_go()
        stored = Stored(tensor, self._take_blocks(tensor.numel() * tensor.element_size()), self._release)
        with self._stream.after_compute():
            for host, device in _pairs(stored.blocks, tensor):
                host.copy_(device, non_blocking=True)
        stored.copied = self._stream.mark()
        stored.before, self._last = self._last, weakref.ref(stored)
        self._newest = stored
        return stored

    def load(self, stored: Stored) -> torch.Tensor:
        """Return the tensor on its device, and begin to fetch the one that was stored before it."""
        assert self._stream is not None
        if stored.on_device is None and stored.fetched is None:
            self._fetch(stored)
        tensor = stored.on_device
        if tensor is None:
            tensor, stored.fetched = stored.fetched, None
            self._stream.hold_compute(stored.arrived)
        if self._newest is stored:
            self._let_go()
        before = stored.before() if stored.before else None
        if before is not None and before.on_device is None and before.fetched is None:
            self._fetch(before)
        assert tensor is not None
        return tensor

    def _let_go(self) -> None:
        """Free the device memory of the newest tensor: what is computed from now on waits for its copy."""
        newest, self._newest = self._newest, None
        if newest is not None and self._stream is not None:
            self._stream.hold_compute(newest.copied)
            newest.on_device = None

    def _fetch(self, stored: Stored) -> None:
        assert self._stream is not None
        stored.fetched = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        with self._stream.after_compute():  # the memory of `fetched` may still be read by what was computed before
            for host, device in _pairs(stored.blocks, stored.fetched):
                device.copy_(host, non_blocking=True)
        stored.arrived = self._stream.mark()

    def _take_blocks(self, num_bytes: int) -> list[torch.Tensor]:
        size = min(_LARGEST_BLOCK, 1 << max(num_bytes - 1, 0).bit_length())
        return [self._take_block(size) for _ in range(-(-num_bytes // size))]

    def _take_block(self, size: int) -> torch.Tensor:
        free = self._free.setdefault(size, [])
        if free:
            return free.pop()
        self.num_bytes += size
        pins = self._stream is not None and self._stream.pins
        return torch.empty(size, dtype=torch.uint8, pin_memory=pins)

    def _release(self, stored: Stored) -> None:
        """Take the blocks back. All copies run on one stream: the next use of a block comes behind the last one."""
        if stored.fetched is not None and self._stream is not None:
            self._stream.hold_compute(stored.arrived)  # its memory is freed while a copy may still write into it
        for block in stored.blocks:
            self._free[len(block)].append(block)


def _pairs(blocks: list[torch.Tensor], tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the blocks with the parts of a contiguous tensor, both as bytes."""
    data = tensor.view(-1).view(torch.uint8)
    start = 0
    for block in blocks:
        part = data[start : start + len(block)]
        yield block[: len(part)], part
        start += len(part)
