"""GGUF files, llama.cpp's format: extended, exported from a checkpoint, and proven."""
