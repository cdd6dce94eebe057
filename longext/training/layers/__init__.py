"""Decoder layers in less memory or time: kernels, tiles, and what is kept of a layer for its backward pass."""
