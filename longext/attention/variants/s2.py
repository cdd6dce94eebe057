"""Groups; half of the heads shifted by half a group (LongLoRA, arXiv 2309.12307, section 3.2)."""

from longext.attention.variant import PLAIN, SHIFTED, AttentionVariant, register

register(
    AttentionVariant(
        "s2",
        PLAIN,
        SHIFTED,
        "groups; half of the heads shifted by half a group, the end pieces apart (no future leak)",
    )
)
