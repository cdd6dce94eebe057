"""One file per way to search: dropped in here, it is a `--searcher` of that name."""
