"""From results to tables: what each command shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longext.evals.statistics import Estimate, leaders
from longext.report.tables import Table, interval, number, percent

if TYPE_CHECKING:
    from longext.conversion.extend import ExtensionPlan
    from longext.conversion.verify import Verification
    from longext.evals.passkey import PasskeyCell
    from longext.evals.perplexity import PerplexityAtLength
    from longext.report.compare import Comparison, MethodResult
    from longext.rope.analysis import DimensionRow


def megabytes(size: int) -> str:
    """Return a size in MB or GB (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def extension_table(plan: ExtensionPlan) -> Table:
    """Old -> new of an extension, one property a row."""
    old, new, spec = plan.rope.parameters, plan.parameters, plan.spec
    rows = [
        ["context length", f"{plan.old_length:,}", f"{plan.new_length:,}"],
        ["max_position_embeddings", f"{plan.old_length:,}", f"{plan.config_length:,}"],
        ["trained length L", "", f"{spec.original_max_position_embeddings:,}"],
        ["factor s (target / L)", "", f"{spec.factor:g}"],
        *([key, _cell(old.get(key)), _cell(new.get(key))] for key in dict.fromkeys([*old, *new]) if key != "factor"),
        ["layers", "", plan.layers],
        ["weights", f"{len(plan.shards)} file(s), {megabytes(plan.weight_bytes)}", "unchanged"],
    ]
    there = "the trained RoPE" if plan.relation == "extends" else plan.rope.spec.method
    return Table(
        f"{plan.config.model}: {spec.method} {plan.relation} {there}",
        ["", "old", "new"],
        [row for row in rows if row[1] or row[2]],
        left=frozenset({1, 2}),
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{len(value)} numbers, {min(value):.4g} to {max(value):.4g}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def dimension_table(rows: Sequence[DimensionRow], trained: int, target: int | None, title: str) -> Table:
    """Wavelength and turns of each dimension pair; with a target, what the method does to it."""
    columns = ["pair", "wavelength", f"turns in {trained:,}", "full turn"]
    if target:
        columns += ["method", f"turns in {target:,}"]
    cells = []
    for row in rows:
        line = [
            str(row.index),
            f"{row.wavelength:,.1f}",
            f"{row.turns:.3g}",
            "yes" if row.completes_a_turn else "never",
        ]
        cells.append([*line, row.treatment, f"{row.turns_at_target:.3g}"] if target else line)
    return Table(title, columns, cells, left=frozenset({3, 4}))


def verification_table(result: Verification) -> Table:
    """One row per check."""
    return Table(
        f"verify {result.model}" + (f" against {result.base}" if result.base else ""),
        ["check", "", "detail"],
        [[check.name, check.status, check.detail] for check in result.checks],
        left=frozenset({1, 2}),
    )


def perplexity_table(name: str, protocol: str, results: Sequence[PerplexityAtLength]) -> Table:
    """Perplexity by length, or by position bucket for the positional protocol."""
    positional = protocol == "positional"
    columns = ["positions" if positional else "length", "ppl", "95% interval", "NLL", "top-1", "tokens scored"]
    rows = [
        [
            f"{row.start:,} - {row.length:,}" if positional else f"{row.length:,}",
            number(row.ppl),
            interval(row.ppl_low, row.ppl_high),
            f"{row.nll:.4f}",
            f"{row.accuracy:.1%}",
            f"{row.num_tokens:,}",
        ]
        for row in results
    ]
    return Table(
        f"Perplexity of {name} ({protocol})",
        columns,
        rows,
        caption=f"{len(results[0].per_document)} document(s); {_interval_note(results[0].resampled)}",
    )


def _interval_note(resampled: str | None) -> str:
    return f"interval: bootstrap over {resampled}" if resampled else "no interval: nothing to resample"


def passkey_table(name: str, protocol: str, cells: Sequence[PasskeyCell], pooled: Mapping[int, PasskeyCell]) -> Table:
    """Accuracy by length (rows) and depth (columns), pooled with its Wilson interval."""
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    by_place = {(cell.length, cell.depth): cell for cell in cells}
    shown = [] if depths == [None] else depths
    rows = [
        [
            f"{length:,}",
            f"{pool.num_tokens:,.0f}",
            *(percent(by_place[length, depth].accuracy) for depth in shown),
            percent(pool.accuracy),
            f"{percent(pool.low)} - {percent(pool.high)}",
            str(pool.num_trials),
        ]
        for length, pool in pooled.items()
    ]
    columns = [
        "length",
        "tokens",
        *(f"depth {d:.0%}" for d in shown if d is not None),
        "accuracy",
        "95% interval",
        "trials",
    ]
    return Table(f"Passkey accuracy of {name} ({protocol})", columns, rows)


Marks = frozenset[tuple[int, int]]


def marks(columns: Sequence[Sequence[Estimate]], *, lower_is_better: bool) -> tuple[Marks, Marks]:
    """Return the places of the best and of those that share the lead, of columns 1, 2, ... of a table."""
    best, tied = set[tuple[int, int]](), set[tuple[int, int]]()
    for column, estimates in enumerate(columns, 1):
        first, others = leaders(estimates, lower_is_better=lower_is_better)
        best |= set() if first is None else {(first, column)}
        tied |= {(row, column) for row in others}
    return frozenset(best), frozenset(tied)


def ppl_estimate(method: MethodResult, length: int) -> Estimate:
    """Return a method's perplexity at a length with its interval, None where there is none."""
    row = method.perplexity_at(length)
    return row.ppl, None if row.ppl_low is None or row.ppl_high is None else (row.ppl_low, row.ppl_high)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Perplexity by length with the short-context price, then passkey by length."""
    methods = comparison.methods
    lengths = [row.length for row in methods[0].perplexity]
    rows = []
    for method in methods:
        price = comparison.short_price(method)
        numbers = [number(row.ppl) for row in method.perplexity]
        rows.append([method.name, *numbers, "" if price is None else f"{price:+.1%}"])
    columns = [[ppl_estimate(method, length) for method in methods] for length in lengths]
    best, tied = marks(columns, lower_is_better=True)
    tables = [
        Table(
            f"Perplexity by context length (trained length {comparison.trained_length:,})",
            ["method", *(f"{length:,}" for length in lengths), f"price at {comparison.short_length:,}"],
            rows,
            best,
            caption="sliding window, token-weighted; price: change against the unchanged model; the best is marked if "
            "its interval meets no other, ~ shares the lead",
            tied=tied,
        )
    ]
    if methods[0].passkey:
        tables.append(_comparison_passkey(comparison))
    return tables


def _comparison_passkey(comparison: Comparison) -> Table:
    pooled = [
        {entry["length"]: entry for entry in method["passkey_by_length"]} for method in comparison.record["methods"]
    ]
    lengths = list(pooled[0])
    columns = [[(own[n]["accuracy"], (own[n]["low"], own[n]["high"])) for own in pooled] for n in lengths]
    best, tied = marks(columns, lower_is_better=False)
    rows = [
        [
            method.name,
            *(f"{percent(own[n]['accuracy'])} ({percent(own[n]['low'])}-{percent(own[n]['high'])})" for n in lengths),
        ]
        for method, own in zip(comparison.methods, pooled, strict=True)
    ]
    trials = pooled[0][lengths[0]]["num_trials"]
    return Table(
        "Passkey accuracy by prompt length",
        ["method", *(f"{length:,}" for length in lengths)],
        rows,
        best,
        caption=f"{trials} prompts per length over all depths; in brackets the 95% Wilson interval; the best is "
        "marked if its interval meets no other, ~ shares the lead",
        tied=tied,
    )
