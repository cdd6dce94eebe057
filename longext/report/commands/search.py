"""What `longext search` shows and writes: the table, the picture of the curve, the factors and the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longext.conversion.extend import write_extension
from longext.report.results import Contents, Written, write_result_files
from longext.report.tables import Table
from longext.staging import staged_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.searching.config import SearchConfig
    from longext.searching.run import Found

CHECKPOINT = "checkpoint"


def search_table(record: dict[str, Any]) -> Table:
    """What was found beside YaRN, on text and prompts that the search has not seen."""
    rows = []
    for row in record["results"]:
        passkey, ppl = row["passkey"], row["ppl"]
        interval = f"{passkey['low']:.0%} to {passkey['high']:.0%}"
        correct = f"{passkey['num_correct']}/{passkey['num_trials']}"
        rows.append([row["name"], correct, interval, f"{ppl['ppl']:.2f}", f"{row['change']:+.1%}"])
    trained, target, seconds = record["trained_length"], record["target_length"], record["seconds"]
    return Table(
        f"Judged at {target:,} tokens",
        ["", "passkey", "95 %", "ppl", f"ppl at {trained:,}"],
        rows,
        caption=f"{record['num_candidates']} candidates, {record['num_windows']} windows; search "
        f"{seconds['search']:.0f} s, {seconds['search_cpu']:.0f} s of CPU",
    )


def point_line(record: dict[str, Any]) -> str:
    """Return the found numbers on one line."""
    found = record["found"]
    point = {**found["point"], "temperature": found["attention_factor"]}
    return "Found: " + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in point.items()) + "."


def curve_picture(found: Found) -> Figure:
    """Factors by pair: what was found, YaRN's and the original, with the critical pairs."""
    from longext.report import plots

    figure = plots.new_figure(7.4, 4.2)
    axes = figure.subplots()
    space = found.space
    pairs = range(space.num_pairs)
    colours = plots.METHOD_COLOURS
    axes.plot(pairs, [1.0] * space.num_pairs, color="#777777", linewidth=1.5, label="original (short texts)")
    yarn = f"YaRN, temperature {found.reference.attention_factor:.3g}"
    axes.plot(pairs, found.reference.factors, color=colours["yarn"], linewidth=2, label=yarn)
    own = f"found, temperature {found.candidate.attention_factor:.3g}"
    axes.plot(pairs, found.candidate.factors, color="#111111", linewidth=2, marker="o", markersize=3, label=own)
    theory = f"critical pair in theory: {space.critical_pair} (no full turn in {space.trained_length:,})"
    axes.axvline(space.critical_pair, color=plots.INK, linewidth=1, linestyle=plots.TRAINED_DASHES, label=theory)
    if chosen := found.candidate.point.get("critical_pair"):
        dots = (0, (1, 2))
        axes.axvline(chosen, color=plots.INK, linewidth=1, linestyle=dots, label=f"critical pair found: {chosen:g}")
    title = f"What frequencies are divided by, for {found.plan.new_length:,} tokens"
    plots.style(axes, title, "dimension pair (fast to slow)", "factor")
    plots.log_ticks(axes)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


def write_search(output: Path, config: SearchConfig, found: Found, journal: Path | None) -> Written:
    """Write result.json, factors.json, curve.png, the journal, and in `checkpoint` a checkpoint for transformers."""
    extra = {"factors.json": json.dumps(found.factors, indent=2) + "\n"}
    if journal is not None and journal.is_file():
        extra["journal.jsonl"] = journal.read_text(encoding="utf-8")
    contents = Contents(
        command="search",
        config=config,
        record=found.record,
        tables=lambda: [search_table(found.record)],
        figures=lambda: {"curve": curve_picture(found)},
        extra=extra,
    )
    with staged_directory(output, config.force, keep=True) as staging:
        write_extension(found.plan, staging / CHECKPOINT)
        written = write_result_files(staging, contents)
    written.names.append(f"{CHECKPOINT}/")
    return written
