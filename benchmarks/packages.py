"""Check what is in the built packages of a folder: python -m build && python benchmarks/packages.py dist

Says what is missing or too much, one line each, and exits with 1; prints names and sizes where all is as it should be.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

MOST_MB = {".whl": 15, ".gz": 60}
IN_WHEEL = (
    *("longext/__main__.py", "longext/recipes/extend/books-5m-4k-yarn.yaml", "longext/cli/commands/extend.py"),
    *("longext/assets/books-5m/model.safetensors", "longext/assets/books-5m/config.json"),
)
IN_SDIST = (
    *("longext/__main__.py", "recipes/extend/books-5m-4k-yarn.yaml", "tests/conftest.py", "docs/design.md"),
    *("README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "constraints.txt", "Makefile", "action.yml", "PKG-INFO"),
)
NOWHERE = re.compile(r"^(\.git|\.venv|results|dist|build|out|site)/|__pycache__|\.pyc$|\.egg-info/|node_modules/")


def contents(package: Path) -> list[str]:
    """Return the names of the files in a wheel or sdist; those of an sdist without its folder."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            return wheel.namelist()
    with tarfile.open(package) as archive:
        return [member.name.partition("/")[2] for member in archive if member.isfile()]


def problems(names: Iterable[str], wanted: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with the names of a package's files, one line each."""
    names = list(names)
    yield from (f"{name} is missing" for name in wanted if name not in names)
    yield from (f"{name} does not belong there" for name in names if NOWHERE.search(name))


def check(package: Path) -> list[str]:
    """Return what is wrong with a built package."""
    is_wheel = package.suffix == ".whl"
    found = list(problems(contents(package), IN_WHEEL if is_wheel else IN_SDIST))
    size, most = package.stat().st_size / 1e6, MOST_MB[package.suffix]
    return [*found, *([f"{size:.1f} MB, at most {most} are meant"] if size > most else [])]


def main() -> None:
    """Check every package of the folder that the command line names."""
    packages = sorted(Path(sys.argv[1]).glob("longext-*"))
    found = [f"{package.name}: {problem}" for package in packages for problem in check(package)]
    kinds = {package.suffix for package in packages}
    found += [f"no {kind} in {sys.argv[1]}" for kind in sorted(set(MOST_MB) - kinds)]
    for package in packages:
        print(f"{package.name}: {len(contents(package))} files, {package.stat().st_size / 1e6:.1f} MB")
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
