"""LongBench under its authors' protocol."""
