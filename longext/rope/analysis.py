"""What a RoPE means for a model: wavelengths, turns in the trained window, and what a method does to each dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longext.rope.formulas import VANISHING, turns_in_window
from longext.rope.spec import RopeSpec, compute_inv_freq


@dataclass(frozen=True)
class DimensionRow:
    """One dimension pair of a rotary head.

    Attributes:
        index: i, the pair (2i, 2i + 1).
        wavelength: positions for one full turn, 2 pi / inv_freq_i.
        turns: turns made in the trained window, L / wavelength.
        stretch: wavelength after the method / wavelength before (1 = untouched, s = fully interpolated).
        turns_at_target: turns made in the target window after the method.
    """

    index: int
    wavelength: float
    turns: float
    stretch: float
    turns_at_target: float

    @property
    def completes_a_turn(self) -> bool:
        """True if the trained window holds at least one full turn: every phase was seen in training."""
        return self.turns >= 1.0

    @property
    def is_stopped(self) -> bool:
        """True if the method gives this pair the frequency 0, as it is written (`formulas.VANISHING`)."""
        return self.stretch > 0.5 * VANISHING

    @property
    def treatment(self) -> str:
        """How the method treats this dimension: kept, stretched (by how much), or stopped."""
        if self.is_stopped:
            return "stopped"
        return "kept" if abs(self.stretch - 1) < 1e-9 else f"stretched {self.stretch:.2f}x"


def dimension_rows(before: RopeSpec, after: RopeSpec, target_length: int) -> list[DimensionRow]:
    """Return one row per turning dimension pair: `before` is the model's RoPE, `after` the method's at the target."""
    old, _ = compute_inv_freq(before, before.original_max_position_embeddings)
    new, _ = compute_inv_freq(after, target_length)
    turns = turns_in_window(old, before.original_max_position_embeddings)
    turns_after = turns_in_window(new, target_length)
    turning = range(int((old > 0).sum()))  # proportional RoPE has dimensions without a frequency, at the end
    return [DimensionRow(i, 2 * math.pi / old[i], turns[i], old[i] / new[i], turns_after[i]) for i in turning]
