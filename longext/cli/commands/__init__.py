"""One file per command: dropped in here, it is `longext NAME`."""
