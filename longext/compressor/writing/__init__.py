"""Continuing a text that a model reads in any way: `generate`, conversations, and memories kept in files."""
