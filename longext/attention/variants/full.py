"""Full causal attention."""

from longext.attention.variant import WHOLE, AttentionVariant, register

register(AttentionVariant("full", WHOLE, WHOLE, "full causal attention"))
