"""Context compression: a trained memory for text that does not fit."""
