"""Models as evaluations and compressors see them."""
