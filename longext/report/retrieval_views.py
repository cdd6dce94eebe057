"""Tables and pictures of the retrieval suites: accuracy by task and length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longext.report.plots import INK, METHOD_COLOURS, new_figure, passkey_heat_maps, style
from longext.report.tables import Table, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.evals.retrieval import RetrievalCell

Label = Callable[[int], str]


def thousands(length: int) -> str:
    """Return 4096 as "4,096"."""
    return f"{length:,}"


def retrieval_table(
    title: str,
    cells: Sequence[RetrievalCell],
    pooled: Sequence[RetrievalCell] = (),
    *,
    label: Label = thousands,
    size: str = "length",
    caption: str = "",
) -> Table:
    """Score of each task (rows) at each length (columns) with its interval; the last row pools the tasks."""
    lengths = sorted({cell.length for cell in cells})
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    by_place = {(cell.task, cell.length): cell for cell in [*cells, *pooled]}
    shown = [*tasks, *dict.fromkeys(cell.task for cell in pooled)] if len(tasks) > 1 else tasks
    rows = [[task, *(_score(by_place.get((task, length))) for length in lengths)] for task in shown]
    counts = sorted({cell.num_trials for cell in cells})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    notes = [f"{number} prompts a cell, in brackets the 95% interval", *([caption] if caption else [])]
    columns = ["task", *(f"{size} {label(length)}".strip() for length in lengths)]
    return Table(title, columns, rows, caption="; ".join(notes))


def _score(cell: RetrievalCell | None) -> str:
    return "-" if cell is None else f"{percent(cell.score)} ({percent(cell.low)}-{percent(cell.high)})"


def prompt_table(title: str, cells: Sequence[RetrievalCell], *, label: Label = thousands) -> Table:
    """One row per task and size: accuracy, interval, measured tokens; for suites whose sizes are not tokens."""
    rows = [
        [
            cell.task,
            label(cell.length),
            f"{cell.num_tokens:,.0f}" if cell.num_tokens else "-",
            percent(cell.score),
            f"{percent(cell.low)} - {percent(cell.high)}",
            str(cell.num_trials),
        ]
        for cell in cells
    ]
    return Table(title, ["task", "size", "tokens", "accuracy", "95% interval", "cases"], rows)


def retrieval_heat_map(
    cells: Sequence[Mapping[str, Any]], *, title: str, label: Label = thousands, size: str = "tokens"
) -> Figure:
    """Score by length (columns) and task (rows), the share written in each cell."""
    lengths = sorted({cell["length"] for cell in cells})
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    values = {(cell["task"], cell["length"]): cell["score"] for cell in cells}
    matrix = [[values.get((task, length), float("nan")) for length in lengths] for task in tasks]
    width = 0.1 * max(map(len, tasks)) + max(2.4, 0.8 * len(lengths)) + 0.9
    figure = new_figure(max(width, 0.083 * len(title)), 0.38 * len(tasks) + 1.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    axes = figure.subplots()
    axes.pcolormesh(matrix, cmap="YlGnBu", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    for r, row in enumerate(matrix):
        for c, value in enumerate(row):
            text = f"{100 * value:.0f}" if value == value else "-"
            colour = "white" if value > 0.55 else INK
            axes.text(c + 0.5, r + 0.5, text, ha="center", va="center", fontsize=8.5, color=colour)
    axes.set_xticks([c + 0.5 for c in range(len(lengths))], [label(length) for length in lengths], fontsize=8.5)
    axes.set_yticks([r + 0.5 for r in range(len(tasks))], tasks, fontsize=8.5)
    axes.set_xlabel(size, fontsize=9, color=INK)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def needle_depth_maps(rows: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """One map per task: score by length and depth of the first needle asked for."""
    maps: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        maps.setdefault(row["task"], []).append({**row, "num_correct": row["score"] * row["num_trials"]})
    return passkey_heat_maps(maps, title=title)


def accuracy_by_size(cells: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """One panel per task: accuracy with its 95 % interval for each number of lines or topics."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    figure = new_figure(max(4.2 * len(tasks) + 0.6, 0.083 * len(title)), 3.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [cell for cell in cells if cell["task"] == task]
        places = list(range(len(own)))
        values = [100 * cell["score"] for cell in own]
        below = [max(0.0, 100 * (cell["score"] - cell["low"])) for cell in own]
        above = [max(0.0, 100 * (cell["high"] - cell["score"])) for cell in own]
        axes.bar(places, values, width=0.5, color=METHOD_COLOURS["yarn"], alpha=0.35)
        axes.errorbar(
            places,
            values,
            [below, above],
            fmt="o",
            color=METHOD_COLOURS["yarn"],
            ecolor=INK,
            elinewidth=1.2,
            capsize=3,
            clip_on=False,
            zorder=3,
        )
        style(axes, "", f"number of {task}", "accuracy, %")
        axes.set_xticks(places, [f"{cell['length']:,}" for cell in own])
        axes.set_xlim(-0.8, len(own) - 0.2)
        axes.set_ylim(0, 103)
        axes.grid(False, axis="x")
    return figure
