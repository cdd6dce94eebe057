"""Checkpoints made from others: extended, merged, converted, and proven."""
