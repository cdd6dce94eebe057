"""Self-contained HTML pages, that of a comparison among them: no scripts, no downloads, pictures inline as SVG."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from string import Template
from typing import TYPE_CHECKING, Any

from longext.evals.statistics import Estimate, leaders, wilson_interval
from longext.report.plots import nll_by_position, passkey_heat_maps, perplexity_by_length, to_svg
from longext.report.tables import Table, number, percent
from longext.report.views import ppl_estimate
from longext.settings import shown_name as named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longext.report.compare import Comparison

_FEW = 3  # names that a card has room for
_STYLE = """
:root { --ink: #1d2129; --soft: #5c6470; --line: #e4e7ec; --paper: #ffffff; --wash: #f6f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
.lead { color: var(--soft); margin: 0 0 24px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; margin: 0 0 22px; }
.card, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 16px 18px; }
.card .label { color: var(--soft); font-size: 12.5px; }
.card .value { font-size: 22px; font-weight: 650; margin: 2px 0; }
.card .note { color: var(--soft); font-size: 13px; }
section { padding: 20px 22px; margin: 0 0 18px; overflow-x: auto; }
h3 { font-size: 15px; margin: 22px 0 6px; }
section > p { color: var(--soft); margin: 0 0 12px; max-width: 76ch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th.left, td.left { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; }
td.wrap:first-child { white-space: nowrap; }
td.best { font-weight: 700; color: var(--accent); background: #eef6fb; }
tr:last-child td { border-bottom: 0; }
svg { display: block; width: 100%; max-width: 900px; height: auto; margin: 18px auto 0; }
code, pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 6px 0 14px; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
section > p.caption { font-size: 13px; margin: 6px 0 0; }
ul.notes { color: var(--soft); font-size: 13.5px; margin: 12px 0 0; padding-left: 20px; max-width: 92ch; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 13px; text-align: center; }
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body><main>
<h1>$title</h1>
<p class="lead">$lead</p>
$sections
<footer>longext $version</footer>
</main></body></html>
""")


def comparison_figures(comparison: Comparison) -> dict[str, Figure]:
    """Return the pictures of a comparison by file name."""
    methods = comparison.record["methods"]
    trained = comparison.trained_length
    model = named(comparison.record["model"]["id"])
    figures = {
        "perplexity": perplexity_by_length(
            {m["name"]: m["perplexity"] for m in methods},
            trained=trained,
            title=f"{model}: perplexity by context length",
        ),
        "positions": nll_by_position(
            {m["name"]: m["positions"] for m in methods}, trained=trained, title=f"{model}: NLL by position, one pass"
        ),
    }
    if methods[0]["passkey"]:
        figures["passkey"] = passkey_heat_maps(
            {m["name"]: m["passkey"] for m in methods}, title=f"{model}: passkey accuracy, %"
        )
    return figures


def comparison_page(comparison: Comparison, tables: Sequence[Table], figures: Mapping[str, Figure]) -> str:
    """Return the HTML page of a comparison."""
    record = comparison.record
    longest = comparison.methods[0].perplexity[-1].length
    svg = {name: to_svg(figure, name) for name, figure in figures.items()}
    sections = [
        section("Perplexity by context length", tables[0].caption, table_html(tables[0]) + svg["perplexity"]),
        section(
            "Where in the window it breaks",
            "Loss by position in one pass over the longest window. A method that holds keeps falling, or stays level, "
            "to the right of the trained length.",
            svg["positions"],
        ),
    ]
    if "passkey" in svg:
        sections.append(section("Passkey retrieval", tables[1].caption, table_html(tables[1]) + svg["passkey"]))
    sections += [section("Methods", "What longext extend writes for each.", _methods(comparison)), _measured(record)]
    cards = "".join(_card(*card) for card in _cards(comparison, longest))
    return page(
        f"{named(record['model']['id'])}: {comparison.trained_length:,} to {longest:,} tokens without training",
        _lead(record),
        [f'<div class="cards">{cards}</div>', *sections],
        record["versions"]["longext"],
    )


def page(title: str, lead: str, sections: Sequence[str], version: str) -> str:
    """Return a page; `sections` are HTML, the rest is text."""
    return _PAGE.substitute(
        style=_STYLE,
        title=html.escape(title),
        lead=html.escape(lead),
        sections="\n".join(sections),
        version=html.escape(version),
    )


def _lead(record: Mapping[str, Any]) -> str:
    data = record["data"]
    names = [method["name"] for method in record["methods"]]
    count, beside = len(set(names) - {"none"}), " and the unchanged model" if "none" in names else ""
    documents = "document" if data["num_documents"] == 1 else f"{data['num_documents']} documents"
    return (
        f"{count} RoPE extension method{'' if count == 1 else 's'} at factor {record['factor']:g}{beside}, on the same "
        f"{documents} "
        f"({data['num_tokens']:,} tokens of {data['source']}), the same prompts and the same protocol."
    )


def _cards(comparison: Comparison, longest: int) -> list[tuple[str, str, str]]:
    """Return (label, value, note) facts: best perplexity at the longest length, passkey, price in the old window."""
    methods = comparison.methods
    estimates = {method.name: ppl_estimate(method, longest) for method in methods}
    names = _leading(estimates, lower_is_better=True)
    note = f"perplexity {_with_interval(*estimates[names[0]], number)}"
    if "none" in estimates and "none" not in names:
        note += f", unchanged model {_with_interval(*estimates['none'], number)}"
    cards = [(f"Lowest perplexity at {longest:,} tokens", _joined(names), note)]
    best = next(method for method in methods if method.name == names[0])
    price = comparison.short_price(best)
    if price is not None and best.name != "none":
        owner = "Its price" if len(names) == 1 else f"Price of {best.name}"
        told = "perplexity against the unchanged model"
        cards.append((f"{owner} at {comparison.short_length:,} tokens", f"{price:+.1%}", told))
    if methods[0].passkey:
        cards.append(_passkey_card(comparison))
    return cards


def _passkey_card(comparison: Comparison) -> tuple[str, str, str]:
    trained = comparison.trained_length
    estimates = {m["name"]: _accuracy_beyond(m, trained) for m in comparison.record["methods"]}
    names = _leading(estimates, lower_is_better=False)
    note = f"{_with_interval(*estimates[names[0]], percent)} of the prompts"
    return "Best passkey recall beyond the trained length", _joined(names), note


def _leading(estimates: Mapping[str, Estimate], *, lower_is_better: bool) -> list[str]:
    """Return the best, and those that it is not told apart from, the best value first."""
    names = list(estimates)
    first, tied = leaders(list(estimates.values()), lower_is_better=lower_is_better)
    shared = [names[first]] if first is not None else [names[i] for i in sorted(tied)] or names
    return sorted(shared, key=lambda name: estimates[name][0] * (1 if lower_is_better else -1))


def _joined(names: Sequence[str]) -> str:
    told = ["unchanged model" if name == "none" else name for name in names[:_FEW]]
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f"{' ~ '.join(told)}{more}"


def _with_interval(value: float, interval: tuple[float, float] | None, spell: Callable[[float], str]) -> str:
    return spell(value) + (f" ({spell(interval[0])}-{spell(interval[1])})" if interval else "")


def _accuracy_beyond(method: Mapping[str, Any], trained: int) -> tuple[float, tuple[float, float]]:
    cells = [cell for cell in method["passkey"] if cell["length"] > trained] or method["passkey"]
    correct, trials = (sum(cell[name] for cell in cells) for name in ("num_correct", "num_trials"))
    return correct / trials, wilson_interval(correct, trials)


def _card(label: str, value: str, note: str) -> str:
    parts = zip(("label", "value", "note"), (label, value, note), strict=True)
    return f'<div class="card">{"".join(f"""<div class="{kind}">{html.escape(text)}</div>""" for kind, text in parts)}</div>'


def section(title: str, text: str, body: str) -> str:
    """Return a section of a page: `title` and `text` are text, `body` is HTML."""
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}</section>"


def table_html(table: Table) -> str:
    """Return a table without its title and caption."""

    def cell(tag: str, text: str, column: int, best: bool = False) -> str:
        classes = " ".join(name for name, on in (("left", table.is_left(column)), ("best", best)) if on)
        return f'<{tag} class="{classes}">{html.escape(text)}</{tag}>'

    head = "".join(cell("th", text, i) for i, text in enumerate(table.columns))
    rows = [
        "".join(cell("td", text, c, (r, c) in table.best) for c, text in enumerate(table.texts(r)))
        for r in range(len(table.rows))
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _methods(comparison: Comparison) -> str:
    rows = []
    for method in comparison.methods:
        shown = {k: f"[{len(v)} numbers]" if isinstance(v, list) else v for k, v in method.rope_parameters.items()}
        cells = (method.name, method.formula, json.dumps(shown))
        rows.append(
            "".join(
                f'<td class="left wrap">{"<code>" if i else ""}{html.escape(c)}{"</code>" if i else ""}</td>'
                for i, c in enumerate(cells)
            )
        )
    head = "".join(f'<th class="left">{name}</th>' for name in ("method", "formula", "rope_parameters"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _measured(record: Mapping[str, Any]) -> str:
    model, data, protocol, versions = record["model"], record["data"], record["protocol"], record["versions"]
    facts = {
        "model": f"{model['id']}, {model['num_parameters']:,} parameters, {model['dtype']}, attention {model['attention']}",
        "device": model["device"] + (f", {model['num_threads']} threads" if model["num_threads"] else ""),
        "data": f"{data['source']}: {data['num_documents']} document(s), {data['num_tokens']:,} tokens, sha256 {data['sha256'][:16]}",
        "perplexity": f"{protocol['perplexity']['id']}, stride {protocol['perplexity']['stride']}: {protocol['perplexity']['definition']}",
        "positions": f"{protocol['positions']['id']}: {protocol['positions']['definition']}",
        "passkey": f"{protocol['passkey']['id']}: {protocol['passkey']['definition']}"
        if protocol["passkey"]
        else "not run",
        "seed": str(protocol["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    body = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return (
        "<section><h2>How it was measured</h2><p>The same numbers are in result.json and results.csv beside this page.</p>"
        f"<pre>{html.escape(record['command'])}</pre><dl>{body}</dl></section>"
    )
