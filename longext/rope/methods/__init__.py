"""One file per RoPE method: dropped in here, it is a `--method` of that name (`longext.rope.spec.ROPE_METHODS`)."""
