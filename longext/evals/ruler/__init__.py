"""RULER's needles."""
