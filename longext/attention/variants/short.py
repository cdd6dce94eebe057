"""Groups without shift: LongLoRA's ablation (arXiv 2309.12307, table 6)."""

from longext.attention.variant import PLAIN, AttentionVariant, register

register(AttentionVariant("short", PLAIN, PLAIN, "groups without shift (the paper's ablation)"))
