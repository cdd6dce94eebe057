"""The architectures, one file each; importing this registers them."""

from longext.compressor.architectures import autocompressor, beacon, gist, icae, prefix, rmt, uio

__all__ = ["autocompressor", "beacon", "gist", "icae", "prefix", "rmt", "uio"]
