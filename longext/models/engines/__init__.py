"""Models that an inference engine runs, as evaluations see them."""
