"""One file per evaluation: dropped in here, it is `longext eval NAME`."""
