"""Tables of named entries: found in a folder of modules or registered, imported when used."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from longext.errors import ConfigError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "Did you mean 'x'? Available: a, b, c." for an unknown `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Available: {', '.join(known)}."


class Registry(Generic[T]):
    """A table of named entries.

    With a `package`, every module in that folder and its subfolders is an entry: `ntk_by_parts.py` is "ntk-by-parts"
    and registers itself under that name when it is imported, which happens on first use. Names and summaries are listed
    without an import, so that `--help` needs no torch.

    Args:
        kind: what an entry is called in messages, for example "method".
        package: dotted name of the folder, or nothing if entries are registered by hand alone.
        order: names that come first when entries are listed; the others follow by name.
    """

    def __init__(self, kind: str, package: str = "", order: Iterable[str] = ()) -> None:
        self.kind = kind
        self.package = package
        self._order = tuple(order)
        self._entries: dict[str, T] = {}
        self._summaries: dict[str, str] = {}

    def register(self, name: str, entry: T, summary: str = "") -> T:
        """Add `entry` under `name`, with one line on it; a second entry of that name is a bug of the caller."""
        assert name not in self._entries, f"{self.kind} {name!r} registered twice"
        self._entries[name] = entry
        self._summaries[name] = summary
        return entry

    def unregister(self, name: str) -> None:
        """Remove an entry that was registered at run time."""
        del self._entries[name], self._summaries[name]

    def summary(self, name: str) -> str:
        """Return one line on an entry: the one it was registered with, else the first of its module's docstring."""
        if self._summaries.get(name) or name not in self._modules():
            return self._summaries.get(name, "")
        spec = importlib.util.find_spec(self._modules()[name])
        assert spec is not None and spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        return text.partition("\n")[0].rstrip(".")

    def __getitem__(self, name: str) -> T:
        """Return the entry called `name`.

        Raises:
            ConfigError: no such entry; names the nearest one.
        """
        if name not in self._entries and name in self._modules():
            module = importlib.import_module(self._modules()[name])
            assert name in self._entries, f"{module.__name__} does not register the {self.kind} {name!r}"
        if name not in self._entries:
            raise ConfigError(f"Unknown {self.kind} '{name}'. {did_you_mean(name, self)}")
        return self._entries[name]

    def values(self) -> list[T]:
        """Return every entry in the order of their names; all modules are imported."""
        return [self[name] for name in self]

    def loaded(self) -> list[T]:
        """Return the entries whose modules were imported already, in the order of their names."""
        return [self._entries[name] for name in self if name in self._entries]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._modules()

    def __iter__(self) -> Iterator[str]:
        names = dict.fromkeys([*sorted(self._modules()), *self._entries])
        first = [name for name in self._order if name in names]
        return iter([*first, *(name for name in names if name not in first)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _modules(self) -> dict[str, str]:
        """Return name -> module of the files in the folder; those that begin with "_" are no entries."""
        if not self.package:
            return {}
        paths = importlib.import_module(self.package).__path__
        found = pkgutil.walk_packages(paths, f"{self.package}.")
        names = {each.name: each.name.rpartition(".")[2] for each in found if not each.ispkg}
        return {stem.replace("_", "-"): name for name, stem in names.items() if not stem.startswith("_")}
