"""One file per attention variant: dropped in here, it is an `--attention` of that name."""
