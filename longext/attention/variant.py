"""What an attention variant of training is: how each half of the heads cuts a segment. Its files are in `variants/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longext.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Cut:
    """How a segment is cut into pieces of at most G tokens, the group size; a segment of at most G stays whole.

    Attributes:
        first: G -> tokens of the first piece; the others have G. None keeps the segment whole.
        reorder: (flat token numbers int64 [n], G) -> the same in the order that is cut; None keeps their order.
    """

    first: Callable[[int], int] | None
    reorder: Callable[[NDArray[np.int64], int], NDArray[np.int64]] | None = None


WHOLE = Cut(None)
PLAIN = Cut(lambda group_size: group_size)
SHIFTED = Cut(lambda group_size: group_size // 2)  # both ends are pieces of their own: nothing sees the future


@dataclass(frozen=True)
class AttentionVariant:
    """How the heads of a layer attend in train mode; in eval mode all of them attend fully.

    Attributes:
        name: of the variant, "s2".
        lower, upper: how the first floor(H / 2) heads and the others cut a segment.
        summary: one line for reports.
        leaks: some tokens see later ones, as in LongLoRA's code.
    """

    name: str
    lower: Cut
    upper: Cut
    summary: str
    leaks: bool = False

    @property
    def implementation(self) -> str:
        """Its name in transformers' registries."""
        return f"{self.name.replace('-', '_')}_attn"


ATTENTION_VARIANTS: Registry[AttentionVariant] = Registry("attention", "longext.attention.variants")


def register(variant: AttentionVariant) -> None:
    """Add a variant under its name."""
    ATTENTION_VARIANTS.register(variant.name, variant, variant.summary)
