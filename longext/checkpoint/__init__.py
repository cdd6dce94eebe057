"""Checkpoints as they are: found, read, checked and loaded."""
