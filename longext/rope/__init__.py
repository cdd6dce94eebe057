"""RoPE: a RoPE as data and methods by name (spec.py), one file per method (methods/), what it means (analysis.py)."""

from longext.rope.spec import ROPE_METHODS, RopeSpec, compute_inv_freq, rope_parameters

__all__ = ["ROPE_METHODS", "RopeSpec", "compute_inv_freq", "rope_parameters"]
