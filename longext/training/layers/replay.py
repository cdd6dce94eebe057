"""Run a part of a forward pass again as it ran first: the same autocast, the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """The random states of the CPU and of a tensor's device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._kind = tensor.device.type
        self._cpu_state = torch.get_rng_state()
        self._devices, self._device_states = get_device_states(tensor)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again; on leaving, random numbers go on where they were."""
        with torch.random.fork_rng(self._devices, device_type=self._kind if self._devices else "cuda"):
            torch.set_rng_state(self._cpu_state)
            set_device_states(self._devices, self._device_states, device_type=self._kind)
            yield


class Surroundings:
    """What a forward pass depends on besides its inputs: autocast, and the random states of the CPU and of a device.

    Args:
        tensor: an input of that forward pass, which tells the device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._kind = tensor.device.type
        self._autocast = torch.is_autocast_enabled(self._kind), torch.get_autocast_dtype(self._kind)
        self._random = RandomState(tensor)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Put them back; undone on leaving.

        Autocast keeps the copies of weights that it has cast, with or without a graph as they were made. They are
        dropped at both ends: a weight that was cast without a graph would take no gradient.
        """
        enabled, dtype = self._autocast
        with self._random.again(), torch.autocast(self._kind, dtype=dtype, enabled=enabled):
            torch.clear_autocast_cache()
            try:
                yield
            finally:
                torch.clear_autocast_cache()
