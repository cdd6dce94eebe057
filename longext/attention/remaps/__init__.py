"""One file per method of position remapping: dropped in here, it is a `--method` of that name."""
