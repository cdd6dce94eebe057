"""Results are files: result.json, a Markdown table and pictures, with run.json and recipe.yaml beside them."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.extras import explain_import
from longext.manifest import write_manifest, write_text
from longext.report.tables import Table
from longext.staging import is_taken, staged_directory
from longext.untrusted import spelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS_ROOT = Path("results")


def output_directory(named: str | None, kind: str, model: str | None) -> Path:
    """Return the directory the user named, or results/<kind>-<model>-<UTC time>; no <model> if it is None."""
    if named:
        return Path(named)
    if model is not None:
        kind += "-" + (re.sub(r"[^\w.-]+", "-", model.rstrip("/").split("/")[-1]) or "model")
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    names = (f"{kind}-{stamp}" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    return next(RESULTS_ROOT / name for name in names if not is_taken(RESULTS_ROOT / name))


def dump_json(value: Any) -> str:
    """Return strict JSON (NaN and infinities as null), indented."""
    return spelled(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a results directory holds.

    Attributes:
        command, config: what was run, for run.json and recipe.yaml.
        tables, figures: what makes the tables, and the pictures by name, saved as NAME.png.
        extra: further text files by name, also "folder/name"; those to be made by a call count as pictures.
    """

    command: str
    config: Any
    record: Mapping[str, Any]
    tables: Callable[[], Sequence[Table]]
    figures: Callable[[], Mapping[str, Figure]] = dict
    extra: Mapping[str, str | Callable[[], str]] = field(default_factory=dict)


@dataclass
class Written:
    """What a command wrote: the names of its files, its tables, and what of the rest could not be made."""

    names: list[str]
    tables: list[Table] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """One line on what could not be made, none if everything was."""
        return [f"note: not made: {'; '.join(self.failures)}. The numbers are complete."] if self.failures else []

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """Return make(), or None and a note if it fails: a picture is not worth the numbers that are there."""
        try:
            return make()
        except Exception as error:
            absent = explain_import(error, "this", ("report",))
            message = " ".join(str(error).split())[:200]
            self.failures.append(f"{name} ({absent or f'{type(error).__name__}: {message}'})")
            return None


def write_results(output: Path, contents: Contents) -> Written:
    """Write one results directory, complete or not at all; see `write_result_files`."""
    with staged_directory(output, contents.config.force, keep=True) as staging:
        return write_result_files(staging, contents)


def write_result_files(directory: Path, contents: Contents, **facts: Any) -> Written:
    """Write a record and all that belongs to it, then tables and pictures; what of these fails is noted and left out.

    Args:
        facts: further keys of run.json.
    """
    texts = {name: text for name, text in contents.extra.items() if isinstance(text, str)}
    for name, text in {"result.json": dump_json(contents.record) + "\n", **texts}.items():
        (directory / name).parent.mkdir(exist_ok=True)
        write_text(directory / name, text)
    write_manifest(directory, contents.command, contents.config, **facts)
    folders = [name.rpartition("/")[0] for name in texts]
    listed = dict.fromkeys(f"{folder}/" if folder else name for folder, name in zip(folders, texts, strict=True))
    written = Written(["result.json", *listed])
    written.tables = list(written.attempt("tables", contents.tables) or ())

    def save(name: str, make: Callable[[], object]) -> None:
        written.attempt(name, make)
        if (directory / name).is_file():
            written.names.append(name)

    if written.tables:
        tables_file = directory / "table.md"
        save("table.md", lambda: write_text(tables_file, "\n".join(table.to_markdown() for table in written.tables)))
    for name, figure in (written.attempt("pictures", contents.figures) or {}).items():
        save(f"{name}.png", partial(_save_png, figure, directory / f"{name}.png"))
    for name, make in contents.extra.items():
        if not isinstance(make, str):
            save(name, partial(_write_text_of, make, directory / name))
    return written


def _write_text_of(make: Callable[[], str], path: Path) -> None:
    write_text(path, make())


def _save_png(figure: Figure, path: Path) -> None:
    """Save a picture, whole or not at all."""
    from longext.report.plots import save_png

    try:
        save_png(figure, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
