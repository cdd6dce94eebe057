"""Texts and conversations as rows for training."""
