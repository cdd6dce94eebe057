"""Reading by segments: what is kept of a text, and how a frozen model reads on behind it."""
