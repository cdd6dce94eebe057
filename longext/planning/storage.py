"""What a machine needs besides its GPUs: host memory and disk, in closed form, part by part; bytes throughout."""

from __future__ import annotations

from dataclasses import dataclass

from longext.planning.devices import GIB
from longext.planning.memory import FULL, host_bytes
from longext.planning.setup import TrainingSetup
from longext.planning.shape import ModelShape

PROCESS = 4 * GIB  # Python, torch, CUDA's libraries and the data of one process
CHECKPOINTS = 3  # the two that are kept and the one that is being written


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes of one machine.

    Attributes:
        pinned: host memory that cannot be swapped: offloaded layer inputs, keys and values of a sweep.
        processes: host memory of the processes themselves, one for each GPU.
        model: files of the base model, at 16 bits.
        checkpoints: adapters (or weights) and AdamW's moments, at 32 bits, three times.
        result: what the run leaves: adapters, or weights at 16 bits.
    """

    pinned: float
    processes: float
    model: float
    checkpoints: float
    result: float

    @property
    def host(self) -> float:
        """Host memory."""
        return self.pinned + self.processes

    @property
    def disk(self) -> float:
        """Disk."""
        return self.model + self.checkpoints + self.result


def plan_storage(shape: ModelShape, setup: TrainingSetup) -> Storage:
    """Return the host memory and the disk of a run, all GPUs in one machine."""
    trained = setup.trainable(shape)
    return Storage(
        pinned=setup.num_gpus * host_bytes(shape, setup).total,
        processes=float(setup.num_gpus * PROCESS),
        model=2.0 * shape.num_parameters,
        checkpoints=float(CHECKPOINTS * trained * 3 * FULL),
        result=float(trained * (2 if setup.is_full else FULL)),
    )
