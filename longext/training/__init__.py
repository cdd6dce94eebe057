"""Training at length, on one process or many."""
