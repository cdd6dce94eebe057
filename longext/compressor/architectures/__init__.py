"""The compressor architectures by name, one file each; a file is imported when its architecture is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longext.registry import Registry

if TYPE_CHECKING:
    from longext.compressor.base import Compressor

_ORDER = "uio anchor matching icae gist autocompressor rmt beacon prefix".split()
COMPRESSORS: Registry[type[Compressor]] = Registry("architecture", __name__, _ORDER)
