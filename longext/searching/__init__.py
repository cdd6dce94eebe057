"""Search for RoPE frequencies on a user's own text, with no training."""
