"""The page and the Markdown of a report: verdict, tables, pictures, and what was read."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import longext
from longext.report.build import Group, Report, Shown, csv_rows
from longext.report.layout import set_title, shown_table, shown_tables
from longext.report.notes import (
    definition_note,
    measured_note,
    report_title,
    results_table,
    set_notes,
    verdict,
)
from longext.report.tables import Table, csv_text

if TYPE_CHECKING:
    from longext.report.draw import Picture
    from longext.report.outcome import Rendered

_LEAD = (
    "Results under one protocol and on the same data share a table; others are in sets of their own. Notes under a "
    "table say what differs in it. The same numbers are in result.json and results.csv next to this page."
)
_WIDTH = 170  # characters of a table on a page: what is wider than the screen scrolls
_GROUP = re.compile(r'<g id="([^"]*)"')
_METHODS = ("Methods", "The RoPE parameters of each result, as `longext extend` writes them.")


def report_files(rendered: Rendered) -> dict[str, str | Callable[[], str]]:
    """Return the files of a report by name, besides its record, tables and pictures."""
    report = rendered.report
    return {
        "results.csv": csv_text(csv_rows(report)),
        "report.html": lambda: report_page(rendered),
        "report.md": lambda: to_markdown(report, rendered.pictures),
    }


def report_page(rendered: Rendered) -> str:
    """Return the report as one HTML file: pictures, style and script are inside, nothing is loaded."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("longext.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    report = rendered.report
    looks = {label: look for picture in rendered.pictures.values() for label, look in picture.looks.items()}
    return environment.get_template("page.html.j2").render(
        title=report_title(report),
        lead=_LEAD,
        verdict=verdict(report),
        sections=_sections(rendered),
        methods=_methods(report),
        methods_text=_METHODS,
        colours={label: look.colour for label, look in looks.items()},
        results=results_table(report),
        left_out=report.left_out,
        version=longext.__version__,
    )


def _sections(rendered: Rendered) -> list[dict[str, Any]]:
    from longext.report.draw import NARROW, report_pictures

    report, wide = rendered.report, rendered.pictures
    narrow = report_pictures(report, NARROW)
    pictures: dict[int, list[Any]] = {}
    for name, picture in wide.items():
        pictures.setdefault(id(picture.shown), []).extend(
            [_svg(picture, f"{name}-wide", "wide"), _svg(narrow[name], f"{name}-narrow", "narrow")]
        )
    return [
        {
            "title": set_title(group, report),
            "name": f"{group.section.name}-{group.number}",
            "definition": definition_note(group),
            "measured": measured_note(group),
            "notes": set_notes(group, report),
            "blocks": [_block(group, shown, pictures.get(id(shown), [])) for shown in group.shown],
        }
        for group in report.groups
    ]


def _block(group: Group, shown: Shown, pictures: Sequence[Any]) -> dict[str, Any]:
    table = shown_table(group, shown, _WIDTH)
    return {"table": table, "rows": _rows(table) if table else [], "pictures": pictures}


def _rows(table: Table) -> list[list[dict[str, Any]]]:
    """Return the cells of a table with what a page marks; an empty cell has the key of the one above it to sort by."""
    rows = []
    for r in range(len(table.rows)):
        cells = [
            {"text": text, "left": table.is_left(c), "best": (r, c) in table.best, "tied": (r, c) in table.tied}
            for c, text in enumerate(table.texts(r))
        ]
        rows.append(cells)
    return rows


def _methods(report: Report) -> list[tuple[str, str]]:
    """Return (label, RoPE parameters) of every result whose RoPE is known, each once."""
    found = {
        label: (part.record["model"] or {}).get("rope_parameters")
        for group in report.groups
        for label, part in zip(group.labels, group.parts, strict=True)
    }
    return [(label, _parameters(rope)) for label, rope in found.items() if rope]


def _parameters(rope: Mapping[str, Any]) -> str:
    short = {key: f"[{len(value)} numbers]" if isinstance(value, list) else value for key, value in rope.items()}
    return json.dumps(short, ensure_ascii=False)


def _svg(picture: Picture, name: str, size: str) -> Any:
    """Return a picture as an SVG element whose colours follow the page and whose points have texts.

    Args:
        name: keeps the ids of its clips apart from those of other pictures.
        size: "wide" or "narrow", the class that the page shows on screens of that width.
    """
    import matplotlib
    from markupsafe import Markup

    from longext.report.plots import GRID, INK

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"longext-{name}", "svg.fonttype": "none"}):
        picture.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    alt, width = html.escape(picture.alt), picture.figure.get_figwidth()
    look = f'class="{size}" {box[0]} style="max-width: {_PIXELS * width:.0f}px"'
    start = f'<svg {look} role="img" tabindex="0" aria-label="{alt}" xmlns:xlink="{_XLINK}">'
    text = start + text[text.index(">") + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    return Markup(_GROUP.sub(lambda match: _group_tag(picture, match[1]), text))


_PIXELS = 110  # an inch of a picture on a page at most
_XLINK = "http://www.w3.org/1999/xlink"


def _group_tag(picture: Picture, name: str) -> str:
    """Return the start tag of an SVG group: a point with its text, a line of a label, or one without an id."""
    kind, _, number = name.partition("-")
    if kind == "tip" and number.isdigit():
        text, label = picture.tips[int(number)]
        return f'<g class="tip" data-tip="{html.escape(text)}" data-series="{picture.labels.index(label)}"'
    if kind == "series" and number.isdigit():
        return f'<g class="series" data-series="{number}"'
    return "<g"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(report: Report, pictures: Mapping[str, Picture]) -> str:
    """Return the report as Markdown; `pictures` by file name, as `draw.report_pictures`."""
    lines = [f"# {report_title(report)}", "", *(f"- {text}" for text in verdict(report)), ""]
    for group in report.groups:
        notes = [note for note in (definition_note(group), measured_note(group)) if note]
        lines += [f"## {set_title(group, report)}", "", *(f"{note}\n" for note in notes)]
        for shown in group.shown:
            lines += [table.to_markdown() for table in shown_tables(group, shown)]
        lines += [f"- {note}" for note in set_notes(group, report)]
        drawn = [(name, picture) for name, picture in pictures.items() if picture.group is group]
        lines += ["", *(f"![{picture.alt}]({name}.png)\n" for name, picture in drawn)]
    lines += ["## Results", "", results_table(report).to_markdown()]
    lines += [f"- Left out: {reason}" for reason in report.left_out]
    return "\n".join(lines).rstrip().replace("<", "&lt;") + "\n"  # names and commands are text, no HTML
