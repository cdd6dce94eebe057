"""Suites that read the published rows of a benchmark from local files."""
