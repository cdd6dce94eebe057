"""The architectures, one file each; importing this registers them."""

from longext.compressor.architectures import anchor, autocompressor, beacon, gist, icae, prefix, rmt, uio

__all__ = ["anchor", "autocompressor", "beacon", "gist", "icae", "prefix", "rmt", "uio"]
