"""LongLoRA's roll by half a group, as its code does it: the beginning of a row attends to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longext.attention.variant import PLAIN, AttentionVariant, Cut, register
from longext.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _rolled(segment: NDArray[np.int64], group_size: int) -> NDArray[np.int64]:
    import numpy as np

    if len(segment) % group_size:
        raise ConfigError(
            f"s2-wrapped reproduces LongLoRA's roll and needs lengths that the group divides: {len(segment)} tokens, "
            f"groups of {group_size}. Use --attention s2, which takes any length."
        )
    return np.roll(segment, -(group_size // 2))


register(
    AttentionVariant(
        "s2-wrapped",
        PLAIN,
        Cut(lambda group_size: group_size, reorder=_rolled),
        "LongLoRA's roll: the shifted heads' first half group sees the last one, which is the future",
        leaks=True,
    )
)
