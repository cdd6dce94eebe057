"""RoPE: the papers' mathematics (methods.py) and what it means for a model (analysis.py)."""

from longext.rope.methods import ROPE_METHODS, RopeSpec, compute_inv_freq, rope_parameters

__all__ = ["ROPE_METHODS", "RopeSpec", "compute_inv_freq", "rope_parameters"]
