"""Results are files: result.json, a Markdown table and pictures, with run.json and recipe.yaml beside them."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.manifest import write_manifest
from longext.reporting.tables import Table
from longext.staging import staged_directory
from longext.untrusted import spelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS_ROOT = Path("results")


def output_directory(given: str | None, kind: str, model: str | None) -> Path:
    """Return the directory the user named, or results/<kind>-<model>-<UTC time>; no <model> where it is None."""
    if given:
        return Path(given)
    if model is not None:
        kind += "-" + (re.sub(r"[^\w.-]+", "-", model.rstrip("/").split("/")[-1]) or "model")
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return RESULTS_ROOT / f"{kind}-{stamp}"


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


def write_results(
    output: Path,
    command: str,
    config: Any,
    record: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write one result directory, complete or not at all.

    Args:
        figures: name -> figure, saved as <name>.png.
        extra: further text files by name (CSV, HTML).
    """
    with staged_directory(output, config.force) as staging:
        write_result_files(staging, command, config, record, tables, figures, extra)


def write_result_files(
    directory: Path,
    command: str,
    config: Any,
    record: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write what `write_results` does into a directory that is there already."""
    from longext.reporting.plots import save_png

    (directory / "result.json").write_text(dump_json(record) + "\n", encoding="utf-8")
    (directory / "table.md").write_text("\n".join(table.to_markdown() for table in tables), encoding="utf-8")
    for name, figure in figures.items():
        save_png(figure, directory / f"{name}.png")
    for name, text in (extra or {}).items():
        (directory / name).write_text(text, encoding="utf-8")
    write_manifest(directory, command, config)
