"""KV policies by name, one file each: which keys of a text stay when there is room for a few."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longext.registry import Registry

if TYPE_CHECKING:
    from longext.compressor.reading.seen import KVPolicy

_ORDER = "streaming snapkv h2o tova knorm keydiff expected kvzip attention-matching".split()
KV_POLICIES: Registry[type[KVPolicy]] = Registry("KV policy", __name__, _ORDER)
